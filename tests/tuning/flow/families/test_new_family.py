"""A flow family of a plugin is trained by its folder: tests/tuning/flow/point_family.py."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import train
from eg3d_rlhf.tuning.flow.base.conditioning import write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, write_pairs
from eg3d_rlhf.tuning.flow.base.ranking import read_latents
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION
from eg3d_rlhf.tuning.flow.families import FAMILIES, family_of
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import make_sampling
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.modes.flow_works import flow
from tests.rejections import check_message, raising, rejected
from tests.tuning.flow import point_family
from tests.tuning.flow.documented_commands import run_section, section_of
from tests.tuning.flow.point_family import POINTS
from tests.tuning.flow.tiny_points import conditions, write_folder

REPO = Path(__file__).resolve().parents[4]
FEW = "--steps=3 --batch=4 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --device=cpu".split()


@pytest.fixture
def root(tmp_path):
    """Write a folder of the family with pairs of its only stage."""
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
    write_conditioning(tmp_path / "PAIRS" / "conditioning.safetensors", conditions())
    return root


def call(tmp_path, *flags):
    folders = [
        f"--pipeline={tmp_path / 'ROOT'}",
        f"--pairs={tmp_path / 'PAIRS'}",
        f"--outdir={tmp_path / 'runs'}",
    ]
    return CliRunner().invoke(train.main, ["--mode=circular-dpo", *folders, *FEW, *flags])


def test_its_files_lead_from_sampled_assets_to_a_tuned_folder(root, tmp_path):
    write_conditioning(tmp_path / "c.safetensors", conditions())
    model = f"--pipeline={root}"
    made = flow("new", tmp_path / "WORK", model, f"--images={tmp_path}", code=2)
    check_message(made, ("--conditioning", "points"))
    flow("new", tmp_path / "WORK", model, f"--conditioning={tmp_path / 'c.safetensors'}", "--each=2")
    flow("sample", tmp_path / "WORK")
    work = Work.open(tmp_path / "WORK")
    ranked = ("tune", work.folder, f"--labels={work.asset_folder()}", "--pairs-only")
    check_message(flow(*ranked, code=2), ("ranking.jsonl, line 1", "rank", "None"))
    path = work.asset_folder() / "ranking.jsonl"
    rows = work.lines()
    assert len(rows) == 6 and (work.asset_folder() / rows[0]["look_at"]).suffix == ".xyz"
    path.write_text("".join(json.dumps({**row, "rank": 1 + row["seed"]}) + "\n" for row in rows))
    assert re.search(r"\b3 .*\bpoints\b", flow(*ranked))
    assert call(tmp_path, "--stage=points", f"--pairs={work.folder / 'pairs'}").exit_code == 0
    (run,) = (tmp_path / "runs").glob("00000-*")
    later = make_sampling(
        work,
        work.check_pipeline(),
        "later",
        ["test"],
        torch.device("cpu"),
        tuned_weights={"points": run / "points"},
    )
    assert later.run().count == 2
    flow("export", run, f"--outdir={tmp_path / 'TUNED'}")
    latents = read_latents(later.folder / "00000-0.safetensors")["points"]
    merged = generate(point_family.FAMILY.load(tmp_path / "TUNED", conditions()), work.names("test"), [0])[0]
    torch.testing.assert_close(merged, latents)
    nothing = flow("export", model, f"--outdir={tmp_path / 'X'}", code=2)
    check_message(nothing, ("WORK", "--weights"))
    unknown = flow("export", model, f"--outdir={tmp_path / 'X'}", "--weights=dots=x", code=2)
    check_message(unknown, ("points", "dots"))
    assert not (tmp_path / "X").exists()


def test_the_worked_example_runs_as_documented(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(FAMILIES._entries, "points")
    shutil.rmtree("PAIRS")
    write_conditioning(Path("CONDITIONING"), conditions())
    name, _, path = section_of("extending.md", "A new flow family")[0].removeprefix("export ").partition("=")
    monkeypatch.setenv(name, str(REPO / path))
    called = run_section("A new flow family", "ROOT", Path(), FEW, page="extending.md")
    assert called == ["new", "sample", "pairs", "train", "export"]
    assert sorted(path.name for path in Path("TUNED").iterdir()) == ["points.json", "points.safetensors"]


def test_the_loop_and_foreign_options_are_rejected(root, tmp_path):
    for flags, names in (
        ([], ("circular", "--stage=points")),
        (["--stage=points", "--set=views=3"], ("--set views", "points")),
        (["--stage=voxels"], ("stage", "points", "'voxels'")),
    ):
        rejected(call(tmp_path, *flags), *names)
        assert not (tmp_path / "runs").exists()


def test_files_that_do_not_fit_are_rejected_in_one_line(root, tmp_path):
    state = load_file(root / "points.safetensors")
    odd = {
        "inner.weight": state["inner.weight"].T.contiguous(),
        "inner.bias": state["inner.bias"],
        "outer.wight": state["outer.weight"],
    }
    save_file(odd, root / "points.safetensors")
    names = ("missing: outer.bias, outer.weight", "unexpected: outer.wight", "inner.weight [9, 8]", "[8, 9]")
    rejected(call(tmp_path, "--stage=points"), *names)


def test_embeddings_and_latents_of_other_generators_are_rejected(root, tmp_path):
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
    rejected(call(tmp_path, "--stage=points"), "'0'", "preferred", "[6, 3]", "[3, 2, 2, 2]")
    other = {name: {"kind": torch.zeros(1, 9), "size": torch.zeros(1)} for name in "abcd"}
    write_conditioning(
        tmp_path / "PAIRS" / "conditioning.safetensors",
        type(conditions())(tokens=other, encoder="another", zero_null=True),
    )
    names = ("kind [1, 4], size [1]", "kind [1, 9], size [1]", "another")
    rejected(call(tmp_path, "--stage=points"), *names)


def test_a_convention_that_contradicts_the_files_is_rejected(root, tmp_path):
    """The network predicts noise minus data, whereas data at t = 1 needs data minus noise."""
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
    check_message(done.stderr.splitlines()[-1], ("'points'", "t = 1", "data_at_one=False"))
    assert "Traceback" not in done.output
    other = "x_0 is noise"
    write_pairs(tmp_path / "PAIRS" / "points", pairs, {"convention": other})
    rejected(call(tmp_path, "--stage=points"), repr(CONVENTION), repr(other))


def test_flags_of_trellis_are_rejected_elsewhere(root, tmp_path):
    write_conditioning(tmp_path / "c.safetensors", conditions())
    flow("new", tmp_path / "WORK", f"--pipeline={root}", f"--conditioning={tmp_path / 'c.safetensors'}")
    (tmp_path / "SAMPLES").mkdir()
    for flags, names in (
        (["--set=views=2"], ("--set views", "points")),
        ([], ("--labels", "ranking.jsonl", "SAMPLES")),
    ):
        labels = f"--labels={tmp_path / 'SAMPLES'}"
        check_message(flow("tune", tmp_path / "WORK", labels, "--pairs-only", *flags, code=2), names)


def test_a_folder_of_no_family_is_rejected_and_a_notice_is_printed_once(root, tmp_path):
    (tmp_path / "none").mkdir()
    with raising(str(tmp_path / "none"), "https://huggingface.co/", kind=FileNotFoundError):
        family_of(tmp_path / "none")
    (tmp_path / "none" / "other.txt").touch()
    with raising(str(tmp_path / "none"), "points.json", "points.safetensors", kind=FileNotFoundError):
        family_of(tmp_path / "none")
    printed = []
    family = FAMILIES["points"]
    object.__setattr__(family, "notice", "NOTICE")
    try:
        assert family_of(root, printed.append) is family_of(root, printed.append) is family
    finally:
        object.__setattr__(family, "notice", "")
    assert printed == ["NOTICE"]
