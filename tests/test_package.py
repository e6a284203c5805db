"""What somebody gets who installs the package: public names, their examples and types, and a wheel that works
in an empty folder.
"""

import doctest
import importlib
import inspect
import os
import subprocess
import sys
import zipfile

import pytest

import eg3d_rlhf

LARGEST = 16 << 20  # bytes of the wheel

USE = """
from eg3d_rlhf import Field, MeshOptions, Preference, Reward, export_mesh, load_generator, load_labels
from eg3d_rlhf import load_reward, observation_of, preference_loss, tune, write_labels, ws_of_seeds

generator = load_generator().generator
field: Field = generator.field(ws_of_seeds(generator, [1], truncation_psi=0.7))
reward: Reward = load_reward()
loss = preference_loss(reward.score(field) - observation_of("sigma", generator).observe(field).mean())
mesh, report = export_mesh(field, MeshOptions(resolution=64))
mesh.save("head.ply")
labels = load_labels(write_labels("labels.jsonl", [Preference(winner=1, loser=2)]))
run = tune(reward="sigma", lambda_r=10)
"""


def test_public_names_are_imported_when_asked_for():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, eg3d_rlhf; print('torch' in sys.modules, len(dir(eg3d_rlhf)))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert loaded[0] == "False" and int(loaded[1]) > len(eg3d_rlhf.__all__)
    assert all(getattr(eg3d_rlhf, name) is not None for name in eg3d_rlhf.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        eg3d_rlhf.nothing  # noqa: B018


@pytest.mark.parametrize("name", [name for name in eg3d_rlhf.__all__ if name != "tune"])
def test_every_public_name_has_an_example_that_runs(name):
    run_example(name)


@pytest.mark.long
def test_the_example_of_tuning_runs():
    run_example("tune")


def run_example(name: str) -> None:
    thing = getattr(eg3d_rlhf, name)
    module = importlib.import_module(thing.__module__)
    tests = [
        test
        for test in doctest.DocTestFinder(recurse=False).find(thing, name, module=module, globs=vars(module))
        if test.examples
    ]
    assert tests and inspect.getdoc(thing)
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.long
def test_a_strict_reader_of_types_finds_nothing_wrong_with_the_public_names(tmp_path, repo):
    (tmp_path / "use.py").write_text(USE)
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = true\nfollow_imports = silent\n")
    words = [sys.executable, "-m", "mypy", f"--config-file={settings}", str(tmp_path / "use.py")]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "MYPYPATH": str(repo)}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_a_wheel_works_in_an_empty_folder(tmp_path, repo):
    """Built and unpacked; dependencies are those of this environment."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        f"--wheel-dir={tmp_path}",
    ]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(repo), str(source)], check=True)
    subprocess.run([*pip, str(source)], check=True)
    wheel = next(tmp_path.glob("eg3d_rlhf-*.whl"))
    print(f"{wheel.stat().st_size / 1e6:.1f} MB")
    assert wheel.stat().st_size < LARGEST
    site = tmp_path / "site"
    empty = tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}

    def job(*words: str) -> str:
        start = "from eg3d_rlhf.modes.jobs import main; main()"
        run = subprocess.run(
            [sys.executable, "-c", start, *words], capture_output=True, text=True, cwd=empty, env=environment
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    job("train", "--reward=sigma", "--lambda-r=10", "--kimg=0.016", "--no-summary")
    assert list(empty.glob("runs/*/network-snapshot-*.safetensors"))
    assert "label" in job("label", "--help")
    assert str(site) in job(
        "generator", "inspect", str(site / "eg3d_rlhf" / "assets" / "generator.safetensors")
    )
