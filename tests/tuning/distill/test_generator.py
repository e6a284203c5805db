"""A run's finished assets as a generator: seeds name assets, and labelling, study, meshes and images take
the file as any other.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.modes import jobs, label, reward_training, samples, study
from eg3d_rlhf.people.label.entities import Kind
from eg3d_rlhf.people.label.pairing import PairingOptions, plan
from eg3d_rlhf.people.label.shape_rendering import surface
from eg3d_rlhf.people.study.design import read_design, study_pairs
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards import boxes as problem
from eg3d_rlhf.rewards.boxes import noses
from tests.rejections import check_message, raising

REPO = Path(__file__).resolve().parents[3]
COUNT = 12
PSI = 0.7
PAIRS = [(box_prompts.PROMPTS[0].text, seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with assets of two arms: heads with one nose, and with three."""
    folder = tmp_path_factory.mktemp("run")
    for arm, shares in (("dreamdpo", (1.0, 0.0, 0.0, 0.0)), ("sds", (1.0, 1.0, 0.0, 1.0))):
        asset = problem.build(box_prompts.PROMPTS[0], torch.tensor(shares).repeat(COUNT, 1))
        asset.shape += torch.linspace(0, 0.1, COUNT).view(-1, 1, 1, 1)
        asset.save(folder / f"assets-{arm}.safetensors", PAIRS)
    return folder


def error_of(command, *flags) -> str:
    """Return the error message of a command, in one line."""
    result = CliRunner().invoke(command, [str(flag) for flag in flags])
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and errors == result.stderr.splitlines()[-1:], (
        result.output,
        result.exception,
    )
    return errors[0]


def test_a_seed_names_an_asset(run):
    loaded = load_generator(run / "assets-sds.safetensors")
    generator = loaded.generator
    points = torch.rand(50, 3) - 0.5
    field = generator.field(ws_of_seeds(generator, [7, 0], PSI))
    assert torch.equal(field.density(points), generator.module.asset.select([7, 0]).density(points))
    assert not torch.equal(*field.density(points))
    assert loaded.nets.training_set["pairs"] == [list(pair) for pair in PAIRS]
    assert loaded.hash != load_generator(run / "assets-dreamdpo.safetensors").hash
    with raising("0 to 11", "12"):
        ws_of_seeds(generator, [3, 12])
    with raising("assets: ", "0 to 11"):
        generator.mapping(torch.zeros(1, generator.z_dim), torch.zeros(1, 25))
    with raising("assets: ", "0 to 11", "[1, 1, 1]", "[0.5]"):
        generator.field(torch.tensor([[[0.5]]]))


def test_it_cannot_be_tuned(run, tiny_data, tmp_path):
    error = error_of(
        train.main, f"--init={run / 'assets-sds.safetensors'}", f"--data={tiny_data}", f"--outdir={tmp_path}"
    )
    check_message(error, ("--init", "assets-sds.safetensors", "discriminator"))


def test_it_is_labelled_whole(run, tmp_path):
    loaded = load_generator(run / "assets-dreamdpo.safetensors")
    options = PairingOptions(first_seed=0, pairs=4, gold=2, training=2, resolution=40, triangles=3000)
    shapes = {shape for pair in plan(options, loaded).pairs for shape in (pair.first, pair.second)}
    assert {shape.seed for shape in shapes} == set(range(12))
    vertices, _ = surface(loaded.generator, next(shape for shape in shapes if not shape.degradation))
    assert (abs(vertices).max(axis=0) > 0.45).all()  # nothing of the cube is cleared
    network = f"--network={run / 'assets-dreamdpo.safetensors'}"
    error = error_of(
        label.main, network, f"--db=sqlite:///{tmp_path / 'labels.db'}", "--first-seed=0", "--pairs=5"
    )
    check_message(error, ("--first-seed=0", "17", "0 to 11"))
    assert not (tmp_path / "labels.db").exists()


def test_two_arms_are_compared_blind(run, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(
        "eg3d_rlhf.people.label.server.app.serve", lambda *args, **kwargs: served.append(args)
    )
    a, b = (
        f"--{side}={run / f'assets-{arm}.safetensors'}" for side, arm in (("a", "sds"), ("b", "dreamdpo"))
    )
    result = CliRunner().invoke(study.main, [a, b, "--n=12", f"--outdir={tmp_path / 'study'}"])
    assert result.exit_code == 0 and served, (result.output, result.exception)
    design = read_design(tmp_path / "study" / "design.json")
    assert sorted(design.seeds()[0]) == list(range(12)) and design.shapes == 12
    planned = study_pairs(design)
    assert {shape.seed for pair in planned for shape in (pair.first, pair.second)} == set(range(12))
    assert sum(pair.kind is Kind.GOLD for pair in planned) == 24  # shapes come again where none are left
    check_message(error_of(study.main, a, b, "--n=13", f"--outdir={tmp_path / 'more'}"), ("--n", "12", "13"))
    check_message(error_of(study.main, a, "--n=3", f"--outdir={tmp_path / 'other'}"), ("--a", "--b"))


def documented() -> list[list[str]]:
    """Arguments of the commands of docs/guides/text-to-3d.md that are about a run's assets."""
    text = (REPO / "docs" / "guides" / "text-to-3d.md").read_text()
    block = text[text.index("## Its assets in the other tools") :].split("```")[1].removeprefix("bash\n")
    return [shlex.split(line) for line in block.strip().splitlines()]


def label_export(folder, path) -> None:
    """Return labels of pairs of a file's assets by an annotator who prefers one nose."""
    loaded = load_generator(folder / "assets-dreamdpo.safetensors")
    rng = np.random.default_rng(0)
    distances = (noses(loaded.generator.module.asset) - 1).abs().tolist()
    pairs = [
        sorted(rng.choice(len(distances), 2, replace=False).tolist(), key=lambda seed: distances[seed])
        for _ in range(400)
    ]
    labels = [
        {"winner": better, "loser": worse, "generator": loaded.hash}
        for better, worse in pairs
        if distances[better] < distances[worse]
    ]
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))


@pytest.mark.long
def test_the_documented_commands(tmp_path, monkeypatch):
    """As written, except that RUN's assets are generated here, a rule replaces the annotators, and the last
    run is shorter.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", lambda *args, **kwargs: None)
    drawn = torch.Generator().manual_seed(0)
    for arm in ("sds", "dreamdpo"):
        asset = problem.build(
            box_prompts.PROMPTS[0], (torch.rand(100, 4, generator=drawn) < problem.FACE_PROBABILITY).float()
        )
        asset.save(
            tmp_path / f"assets-{arm}.safetensors",
            [(box_prompts.PROMPTS[0].text, seed) for seed in range(100)],
        )
    tools = {
        "study.py": study.main,
        "label.py": label.main,
        "train_reward.py": reward_training.train,
        "gen_samples.py": samples.images,
        "train.py": train.main,
        "eg3d-rlhf": jobs.main,
    }
    for words in documented():
        name, *flags = words[words[0] == "python" :]
        flags = [flag.replace("RUN/", f"{tmp_path}/") for flag in flags]
        flags += {
            "--compare=dreamdpo": ["-n"],
            "--compare=sds+geometry": ["--steps=2", "--show=0", "--jobs=1"],
        }.get(flags[1], [])
        result = CliRunner().invoke(tools[name.removeprefix("tools/")], flags)
        if flags[0] == "export":
            assert re.search(r"labels\.jsonl\b.*\b0\b", result.output)  # no annotator has answered
            label_export(tmp_path, tmp_path / "labels.jsonl")
        assert result.exit_code == 0, (name, flags, result.output, result.exception)
    report = json.loads((tmp_path / "runs" / "head-reward" / "report.json").read_text())
    assert report["test"]["labels"]["accuracy"] >= 0.8  # about shapes that training has not seen
    assert (
        len(list((tmp_path / "out").glob("seed*.png"))) == 10
        and (tmp_path / "out" / "head.glb").stat().st_size > 0
    )
    assert json.loads((tmp_path / "runs" / "study-dreamdpo" / "design.json").read_text())["shapes"] == 100
