"""Pairs of TRELLIS's assets and of DSO's samples, and what was tuned, by the commands."""

import json
import re

import pytest
import torch

from eg3d_rlhf.experiments.run import OPTIONS
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.base.conditioning import read_conditions, write_conditions
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from eg3d_rlhf.tuning.flow.families.trellis_assets import read_ply
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw, drawing_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import SHOWN, Work
from tests.modes.flow_works import flow
from tests.rejections import check_message, raising
from tests.tuning.flow.families.trellis.test_export import adapted
from tests.tuning.flow.families.trellis.test_pair_import import (  # noqa: F401 (fixtures)
    ranked,
    read_ranking,
    samples,
    write_list,
)
from tests.tuning.flow.families.trellis.tiny_trellis import tokens


@pytest.fixture
def work(trellis_root, tmp_path):
    write_conditions(tmp_path / "c.safetensors", tokens())
    flow(
        "new",
        tmp_path / "WORK",
        f"--pipeline={trellis_root}",
        f"--conditioning={tmp_path / 'c.safetensors'}",
        "--each=2",
    )
    return Work.open(tmp_path / "WORK")


def test_dso(work, samples):  # noqa: F811
    stale = work.folder / "pairs" / "latent"
    stale.mkdir(parents=True)
    said = flow("tune", work.folder, f"--labels={samples}", "--pairs-only")
    assert re.search(r"\b3 .*\bstructure\b", said) and not stale.exists()
    assert read_conditions(work.folder / "pairs" / "conditioning.safetensors").names == ("000", "001")


def test_what_was_tuned_is_found(pipeline, trellis_root, tmp_path):
    """In the run of a stage, named for the stage, or in a run beside another's; what is named for a stage
    goes first.
    """
    for run, stage in (("one", "structure"), ("two", "latent")):
        adapted(pipeline, tmp_path / run / stage, stage=["structure", "latent"].index(stage))
        (tmp_path / run / OPTIONS).write_text(
            json.dumps({"run": {"source": {"pipeline": str(trellis_root)}}})
        )
    weights = f"--weights=structure={tmp_path / 'one' / 'structure'}"
    root = f"--pipeline={trellis_root}"
    calls = {"a": [tmp_path / "one"], "b": [root, weights], "c": [tmp_path / "one", tmp_path / "two"]}
    for name, flags in calls.items():
        said = flow("export", *flags, f"--outdir={tmp_path / name}")
        tuned = json.loads(said[: said.rindex("}") + 1])["tuned"]
        assert (
            list(tuned) == ["structure", *(["latent"] if name == "c" else [])] and "from_pretrained" in said
        )
    merged = [(tmp_path / name / "ckpts" / "ss_flow.safetensors").read_bytes() for name in calls]
    assert (
        merged[0] == merged[1] == merged[2] != (trellis_root / "ckpts" / "ss_flow.safetensors").read_bytes()
    )
    flow("export", tmp_path / "one", tmp_path / "two", "--adapter", f"--outdir={tmp_path / 'adapters'}")
    assert (tmp_path / "adapters/latent/adapter_model.safetensors").read_bytes() == (
        tmp_path / "two/latent/adapter_model.safetensors"
    ).read_bytes()
    (tmp_path / "other").mkdir()
    empty = [tmp_path / "one", f"--weights=structure={tmp_path / 'other'}"]
    check_message(flow("export", *empty, f"--outdir={tmp_path / 'd'}", code=2), (str(tmp_path / "other"),))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], ("export", "WORK", "--weights")),
        (["nowhere"], ("export", "WORK", "nowhere")),
        (["--weights=mesh=x"], ("--weights", "STAGE=PATH", "--pipeline")),
        (["--pipeline=ROOT", "--weights=mesh"], ("--weights", "STAGE=PATH", "mesh")),
        (["--pipeline=ROOT", "--weights=mesh=x"], ("export", "structure", "latent", "mesh")),
    ],
)
def test_exports_of_nothing_are_refused(trellis_root, tmp_path, flags, names):
    filled = [flag.replace("ROOT", str(trellis_root)) for flag in flags]
    check_message(flow("export", *filled, f"--outdir={tmp_path / 'out'}", code=2), names)
    assert not (tmp_path / "out").exists()


def test_labels_of_nothing_are_refused(work, tmp_path):
    (tmp_path / "empty").mkdir()
    labels = f"--labels={tmp_path / 'empty'}"
    line = flow("tune", work.folder, labels, "--pairs-only", code=2)
    check_message(line, ("DSO", "model_info.npz", str(tmp_path / "empty")))


def test_draw_rank_import(pipeline, trellis_root, work, tmp_path):
    """Assets are drawn, people rank them, and their pairs are of the very latents that were drawn."""
    adapted(pipeline, tmp_path / "adapter")
    drawing = drawing_of(
        work,
        work.check_pipeline(),
        "base",
        SHOWN,
        torch.device("cpu"),
        tuned={"structure": tmp_path / "adapter"},
    )
    assert drawing.run().count == 10
    path = work.drawn() / "ranking.jsonl"
    with raising("line 1", "rank", "None"):
        read_ranking(path, pipeline)
    rows = work.lines()
    write_list(path.parent, [{**row, "rank": 2 - row["seed"]} for row in rows])
    said = flow("tune", work.folder, f"--labels={work.drawn()}", "--pairs-only")
    assert re.search(r"\b5 .*\bstructure\b.*\b5 .*\blatent\b", said)
    # with WORK's conditions
    problem = open_problem(ProblemSource(pipeline=str(trellis_root), pairs=str(work.folder / "pairs")))
    assert {*problem.train_conditions, *problem.held_out_conditions} <= set(work.names(*SHOWN))
    imported = read_ranking(path, pipeline)
    assert imported.report["pairs"] == {"structure": 5, "latent": 5}
    pipeline = FAMILY.load(trellis_root, tokens())
    pipeline.stages[0].model = tuned_model(pipeline.stages[0].model, tmp_path / "adapter")
    name = rows[3]["condition"]
    ((latents, asset),) = draw(pipeline, [name], [1])
    assert rows[3]["seed"] == 1 and torch.equal(
        imported.pairs["structure"][1].preferred, latents["structure"]
    )
    assert torch.allclose(imported.pairs["latent"][1].preferred.feats, latents["latent"].feats, atol=1e-5)
    (same,) = generate(pipeline, [name], [1])
    assert torch.equal(same.means, asset.means)
    assert torch.allclose(read_ply(path.parent / rows[3]["look_at"]).means, same.means)
