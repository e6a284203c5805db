"""A flow family from outside the package is trained by its folder: tests/tuning/flow/point_family.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import train
from eg3d_rlhf.tuning.flow.conditions import write_conditions
from eg3d_rlhf.tuning.flow.drawing import drawing_of
from eg3d_rlhf.tuning.flow.families import FAMILIES, family_of
from eg3d_rlhf.tuning.flow.generate import generate
from eg3d_rlhf.tuning.flow.pairs import PreferencePair, write_pairs
from eg3d_rlhf.tuning.flow.ranking import read_latents
from eg3d_rlhf.tuning.flow.stage import CONVENTION
from eg3d_rlhf.tuning.flow.work import Work
from tests.modes.flow_works import flow
from tests.tuning.flow import point_family
from tests.tuning.flow.documented_commands import run_section, section_of
from tests.tuning.flow.point_family import POINTS
from tests.tuning.flow.tiny_points import conditions, write_folder

REPO = Path(__file__).resolve().parents[3]
FEW = "--steps=3 --batch=4 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --device=cpu".split()


@pytest.fixture
def root(tmp_path):
    """A folder of the family with pairs of its one stage."""
    root = write_folder(tmp_path / "ROOT")
    g = torch.Generator().manual_seed(3)
    pairs = [
        PreferencePair(
            id=str(i),
            condition="abcd"[i % 4],
            stage="points",
            preferred=1 + torch.randn(POINTS, 3, generator=g),
            rejected=torch.randn(POINTS, 3, generator=g) - 1,
        )
        for i in range(8)
    ]
    write_pairs(tmp_path / "PAIRS" / "points", pairs, {"convention": CONVENTION})
    write_conditions(tmp_path / "PAIRS" / "conditions.safetensors", conditions())
    return root


def call(tmp_path, *flags):
    folders = [
        f"--pipeline={tmp_path / 'ROOT'}",
        f"--pairs={tmp_path / 'PAIRS'}",
        f"--outdir={tmp_path / 'runs'}",
    ]
    return CliRunner().invoke(train.main, ["--mode=circular-dpo", *folders, *FEW, *flags])


def test_its_files_go_round_from_drawn_assets_to_a_tuned_folder(root, tmp_path):
    write_conditions(tmp_path / "c.safetensors", conditions())
    model = f"--pipeline={root}"
    assert "expected --conditions for points" in flow(
        "new", tmp_path / "WORK", model, f"--pictures={tmp_path}", code=2
    )
    flow("new", tmp_path / "WORK", model, f"--conditions={tmp_path / 'c.safetensors'}", "--each=2")
    flow("draw", tmp_path / "WORK")
    work = Work.open(tmp_path / "WORK")
    ranked = ("tune", work.folder, f"--labels={work.drawn()}", "--pairs-only")
    assert "ranking.jsonl, line 1: expected a rank, got None" in flow(*ranked, code=2)
    path = work.drawn() / "ranking.jsonl"
    rows = work.lines()
    assert len(rows) == 6 and (work.drawn() / rows[0]["look_at"]).suffix == ".xyz"
    path.write_text("".join(json.dumps({**row, "rank": 1 + row["seed"]}) + "\n" for row in rows))
    assert "pairs with a majority: 3 of stage points" in flow(*ranked)
    assert call(tmp_path, "--stage=points", f"--pairs={work.folder / 'pairs'}").exit_code == 0
    (run,) = (tmp_path / "runs").glob("00000-*")
    later = drawing_of(
        work, work.check_pipeline(), "later", ["test"], torch.device("cpu"), tuned={"points": run / "points"}
    )
    assert later.run().count == 2
    flow("export", run, f"--out={tmp_path / 'TUNED'}")
    latents = read_latents(later.folder / "00000-0.safetensors")["points"]
    merged = generate(point_family.load(tmp_path / "TUNED", conditions()), work.names("test"), [0])[0]
    torch.testing.assert_close(merged, latents)
    assert "expected WORK, runs of train.py or --weights, got none" in flow(
        "export", model, f"--out={tmp_path / 'X'}", code=2
    )
    assert "expected stages among points, got dots" in flow(
        "export", model, f"--out={tmp_path / 'X'}", "--weights=dots=x", code=2
    )


def test_the_worked_example_runs_as_documented(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(FAMILIES._things, "points")
    shutil.rmtree("PAIRS")
    write_conditions(Path("CONDITIONS"), conditions())
    name, _, path = section_of("extending.md", "A new flow family")[0].removeprefix("export ").partition("=")
    monkeypatch.setenv(name, str(REPO / path))
    called = run_section("A new flow family", "ROOT", Path(), FEW, page="extending.md")
    assert called == ["new", "draw", "pairs", "train", "export"]
    assert sorted(path.name for path in Path("TUNED").iterdir()) == ["points.json", "points.safetensors"]


def test_the_loop_and_foreign_options_are_refused(root, tmp_path):
    for flags, message in (
        (
            [],
            (
                "circular: expected a pipeline of two stages or more, got points. One stage needs no loop:"
                " --stage=points."
            ),
        ),
        (
            ["--stage=points", "--set=views=3"],
            "--set views=VALUE: belongs to other generators, and would have no effect on points",
        ),
        (["--stage=voxels"], "stage: expected one of points, got 'voxels'"),
    ):
        done = call(tmp_path, *flags)
        assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
        assert not (tmp_path / "runs").exists()


def test_files_that_do_not_fit_are_refused_in_one_line(root, tmp_path):
    state = load_file(root / "points.safetensors")
    odd = {
        "inner.weight": state["inner.weight"].T.contiguous(),
        "inner.bias": state["inner.bias"],
        "outer.wight": state["outer.weight"],
    }
    save_file(odd, root / "points.safetensors")
    done = call(tmp_path, "--stage=points")
    assert done.exit_code == 2 and "Traceback" not in done.output
    for part in (
        "missing: outer.bias, outer.weight",
        "unexpected: outer.wight",
        "misshapen: inner.weight [9, 8] instead of [8, 9]",
    ):
        assert part in done.output, done.output


def test_conditions_and_latents_of_others_are_refused(root, tmp_path):
    grids = [
        PreferencePair(
            id=str(i),
            condition="a",
            stage="points",
            preferred=torch.ones(3, 2, 2, 2),
            rejected=torch.ones(3, 2, 2, 2),
        )
        for i in range(2)
    ]
    write_pairs(tmp_path / "PAIRS" / "points", grids, {"convention": CONVENTION})
    done = call(tmp_path, "--stage=points")
    assert done.exit_code == 2 and "pair '0', preferred: expected [6, 3], got [3, 2, 2, 2]" in done.output, (
        done.output
    )
    other = {name: {"kind": torch.zeros(1, 9), "size": torch.zeros(1)} for name in "abcd"}
    write_conditions(
        tmp_path / "PAIRS" / "conditions.safetensors",
        type(conditions())(tokens=other, encoder="another", zero_null=True),
    )
    done = call(tmp_path, "--stage=points")
    expected = (
        "expected embeddings {'kind': [1, 4], 'size': [1]}, got {'kind': [1, 9], 'size': [1]} of another"
    )
    assert done.exit_code == 2 and expected in done.output, done.output


def test_a_convention_that_contradicts_the_files_is_refused(root, tmp_path):
    """The network says noise less data, where data at t = 1 wants data less noise."""
    pairs = [
        PreferencePair(
            id=str(i),
            condition="a",
            stage="points",
            preferred=5 + torch.zeros(POINTS, 3),
            rejected=torch.ones(POINTS, 3),
        )
        for i in range(4)
    ]
    write_pairs(tmp_path / "PAIRS" / "points", pairs, {"convention": CONVENTION})
    state = {name: 0 * tensor for name, tensor in load_file(root / "points.safetensors").items()}
    for bias, code in ((5.0, 0), (-5.0, 2)):
        save_file({**state, "outer.bias": torch.full([3], bias)}, root / "points.safetensors")
        done = call(tmp_path, "--stage=points")
        assert done.exit_code == code, done.output
    assert (
        "stage 'points': expected velocities of the convention with data at t = 1, got a model of error"
        in done.output
    )
    assert "Traceback" not in done.output
    write_pairs(tmp_path / "PAIRS" / "points", pairs, {"convention": "x_0 is noise"})
    done = call(tmp_path, "--stage=points")
    assert (
        done.exit_code == 2
        and "expected the convention 'x_0 is data, t = 1 is noise', got 'x_0 is noise'" in done.output
    )


def test_flags_of_trellis_are_refused_elsewhere(root, tmp_path):
    write_conditions(tmp_path / "c.safetensors", conditions())
    flow("new", tmp_path / "WORK", f"--pipeline={root}", f"--conditions={tmp_path / 'c.safetensors'}")
    (tmp_path / "SAMPLES").mkdir()
    for flags in (["--set=views=2"], []):
        said = flow(
            "tune", tmp_path / "WORK", f"--labels={tmp_path / 'SAMPLES'}", "--pairs-only", *flags, code=2
        )
        assert "points" in said or "expected a file of labels or a folder with ranking.jsonl" in said


def test_a_folder_of_no_family_is_refused_and_a_notice_is_said_once(root, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="an empty folder: .*https://huggingface.co/"):
        family_of(tmp_path / "none")
    (tmp_path / "none" / "other.txt").touch()
    with pytest.raises(
        FileNotFoundError,
        match="expected the folder of a known generator .*points: points.json and points.safetensors",
    ):
        family_of(tmp_path / "none")
    said = []
    family = FAMILIES["points"]
    object.__setattr__(family, "notice", "Mind the licence.")
    try:
        assert family_of(root, said.append) is family_of(root, said.append) is family
    finally:
        object.__setattr__(family, "notice", "")
    assert said == ["Mind the licence."]
