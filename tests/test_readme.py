"""What the README shows runs as written: its lines of Python; and the recipe for a released checkpoint on
small stand-ins.
"""

import os
import re
import shlex
import subprocess
import sys

import pytest

from eg3d_rlhf.rewards.release import write_example
from tests import tiny_runs
from tests.generators.pickles.writer import SnapshotWriter, stock_networks
from tests.tools.examples import arguments_of

# Flags that make a line small, and the names of run folders that follow from them.
SMALL = {
    "import": ["--latents=0"],
    "train.py": ["--kimg=0.002", "--batch=2", "--tick=0.001", "--no-summary", "--device=cpu"],
    "evaluate.py": ["--only=reward-shift", "--n=16", "--set=images=16", "--outdir=report"],
    "attribute.py": [
        "--n=2",
        "--method=permutation",
        "--set=permutations=2",
        "--set=steps=2",
        "--set=gap_bound=1000",
        "--set=randomisations=2",
        "--set=checked=1",
        "--outdir=why",
    ],
}


def block(repo, title: str, language: str, page: str = "README.md") -> str:
    """The first code block of a language below a heading of a page."""
    section = (repo / page).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.S)[1]


def test_the_lines_of_python_run(repo, tmp_path, monkeypatch, capsys):
    (tmp_path / "assets").symlink_to(repo / "assets")
    monkeypatch.chdir(tmp_path)
    source = block(repo, "In Python", "python")
    exec(compile(source.replace("resolution=128", "resolution=32"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("tensor([")
    assert (tmp_path / "head.ply").stat().st_size > 1000


def recipe(repo) -> list[list[str]]:
    lines = block(repo, "A released checkpoint", "bash", "docs/guides/eg3d.md").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def command_of(words: list[str], repo) -> list[str]:
    """What a line of the recipe runs here: two processes for eight, small settings."""
    words = [
        word.replace("batch16", "batch2").replace("nproc-per-node=8", "nproc-per-node=2") for word in words
    ]
    small = next(
        (flags for name, flags in SMALL.items() if any(os.path.basename(word) == name for word in words)), []
    )
    if words[0] == "torchrun":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            words[1],
            str(repo / words[2]),
            *words[3:],
            *small,
        ]
    return [*arguments_of(words), *small]


@pytest.mark.long
def test_the_recipe_for_a_released_checkpoint_runs(repo, tmp_path):
    nets = stock_networks()
    (tmp_path / "ffhq512-128.pkl").write_bytes(SnapshotWriter().snapshot(nets))
    tiny_runs.write_dataset(tmp_path / "FFHQ_512.zip", nets.G.img_resolution)
    write_example(tmp_path / "release")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in recipe(repo):
        command = command_of(words, repo)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "report" / "index.html").exists() and (tmp_path / "why" / "index.html").exists()
    assert list((tmp_path / "runs" / "eight").glob("*/network-snapshot-*.safetensors"))


def test_the_picture_of_the_first_page_is_small(repo):
    assert (repo / "docs" / "images" / "turntable.webp").stat().st_size < 2 << 20
