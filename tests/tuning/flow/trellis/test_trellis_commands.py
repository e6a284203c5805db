"""eg3d-rlhf flow files from the outside."""

import json

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.modes.flow_files import main
from eg3d_rlhf.tuning.flow.conditions import read_conditions, write_conditions
from eg3d_rlhf.tuning.flow.drawing import draw, drawing_of
from eg3d_rlhf.tuning.flow.families.trellis.assets import read_ply
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import load_pipeline
from eg3d_rlhf.tuning.flow.generate import generate
from eg3d_rlhf.tuning.flow.work import SHOWN, Work
from tests.modes.flow_works import flow
from tests.tuning.flow.trellis.test_export import adapted
from tests.tuning.flow.trellis.test_pair_import import ranked, read_ranking, samples, write_list  # noqa: F401 (fixtures)
from tests.tuning.flow.trellis.tiny_trellis import tokens


def run(*flags):
    return CliRunner().invoke(main, [str(f) for f in flags])


def test_dso(samples, trellis_root, tmp_path):  # noqa: F811
    done = run("dso", f"--samples={samples}", f"--pipeline={trellis_root}", f"--out={tmp_path / 'out'}")
    assert done.exit_code == 0 and json.loads(done.stdout)["pairs"] == 3
    assert read_conditions(tmp_path / "out" / "conditions.safetensors").names == ("000", "001")


def test_a_run_stands_for_the_stages_that_it_tuned(pipeline, trellis_root, tmp_path):
    """Named by itself, or for a stage; what is named for a stage goes first."""
    adapted(pipeline, tmp_path / "run" / "structure")
    flags = {"a": f"--run={tmp_path}/run", "b": f"--weights=structure={tmp_path}/run",
             "c": f"--weights=structure={tmp_path}/run/structure"}
    for name, flag in flags.items():
        done = run("export", f"--pipeline={trellis_root}", flag, f"--out={tmp_path / name}")
        assert done.exit_code == 0 and list(json.loads(done.stdout)["tuned"]) == ["structure"], done.output
    merged = [(tmp_path / name / "ckpts" / "ss_flow.safetensors").read_bytes() for name in flags]
    assert merged[0] == merged[1] == merged[2] != (trellis_root / "ckpts" / "ss_flow.safetensors").read_bytes()
    (tmp_path / "other").mkdir()
    named = [f"--run={tmp_path / 'run'}", f"--weights=structure={tmp_path / 'other'}", f"--out={tmp_path / 'd'}"]
    done = run("export", f"--pipeline={trellis_root}", *named)
    assert done.exit_code == 2 and "expected weights or a folder with" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["export"], "export: expected --run or --weights, got neither"),
        (["export", "--run=nowhere"], "--run: expected a finished run of train.py, got no tuned structure or latent in nowhere"),
        (["export", "--weights=mesh=x"], "--weights: expected stages among structure, latent"),
        (["dso", "--samples=nowhere"], "DSO samples: expected model_info.npz"),
        (["ranking", "--list=nowhere"], "ranking: expected a list of ranked assets"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(trellis_root, tmp_path, flags, message):
    done = run(*flags, f"--pipeline={trellis_root}", f"--out={tmp_path / 'out'}")
    assert done.exit_code == 2 and done.stderr.startswith("Error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_draw_rank_import(pipeline, trellis_root, tmp_path):
    """Assets are drawn, people rank them, and their pairs are of the very latents that were drawn."""
    adapted(pipeline, tmp_path / "adapter")
    write_conditions(tmp_path / "c.safetensors", tokens())
    flow("new", tmp_path / "WORK", f"--pipeline={trellis_root}", f"--conditions={tmp_path / 'c.safetensors'}", "--each=2")
    work = Work.open(tmp_path / "WORK")
    drawing = drawing_of(work, work.check_pipeline(), "base", SHOWN, torch.device("cpu"), tuned={"structure": tmp_path / "adapter"})
    assert drawing.run().count == 10
    path = work.drawn() / "ranking.jsonl"
    with pytest.raises(ValueError, match="line 1: expected a rank, got None"):
        read_ranking(path, pipeline)
    rows = work.lines()
    write_list(path.parent, [{**row, "rank": 2 - row["seed"]} for row in rows])
    done = run("ranking", f"--list={path}", f"--pipeline={trellis_root}", f"--out={tmp_path / 'PAIRS'}")
    assert done.exit_code == 0 and set(read_conditions(tmp_path / "PAIRS").names) == set(work.names(*SHOWN)), done.output
    imported = read_ranking(path, pipeline)
    assert imported.report["pairs"] == {"structure": 5, "latent": 5}
    pipeline = load_pipeline(trellis_root, tokens())
    pipeline.stages[0].model = tuned_model(pipeline.stages[0].model, tmp_path / "adapter")
    name = rows[3]["condition"]
    ((latents, asset),) = draw(pipeline, [name], [1])
    assert rows[3]["seed"] == 1 and torch.equal(imported.pairs["structure"][1].preferred, latents["structure"])
    assert torch.allclose(imported.pairs["latent"][1].preferred.feats, latents["latent"].feats, atol=1e-5)
    (same,) = generate(pipeline, [name], [1])
    assert torch.equal(same.means, asset.means)
    assert torch.allclose(read_ply(path.parent / rows[3]["look_at"]).means, same.means)
