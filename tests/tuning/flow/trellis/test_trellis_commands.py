"""eg3d-rlhf flow files from the outside."""

import json

import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.modes.flow_files import main
from eg3d_rlhf.tuning.flow.conditions import read_conditions, write_conditions
from eg3d_rlhf.tuning.flow.families.trellis.assets import read_ply
from eg3d_rlhf.tuning.flow.families.trellis.pipeline import load_pipeline
from eg3d_rlhf.tuning.flow.generate import generate
from eg3d_rlhf.tuning.flow.ranking import RANKING, draw
from tests.tuning.flow.trellis.test_export import adapted
from tests.tuning.flow.trellis.test_pair_import import ranked, read_ranking, samples, write_list  # noqa: F401 (fixtures)
from tests.tuning.flow.trellis.tiny_trellis import E, tokens


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


def test_conditions(trellis_root, tmp_path, monkeypatch):
    class Encoder:
        def __init__(self, name, device):
            assert name == "openai/clip-vit-large-patch14"

        def conditions(self, texts):
            from eg3d_rlhf.tuning.flow.conditions import Conditions

            return Conditions(tokens={t: torch.zeros(2, E) for t in (*texts, "")})

    monkeypatch.setattr("eg3d_rlhf.tuning.flow.families.trellis.family.TextEncoder", Encoder)
    (tmp_path / "texts.txt").write_text("a chair\n\n a boat \n")
    done = run("conditions", f"--texts={tmp_path / 'texts.txt'}", f"--pipeline={trellis_root}", f"--out={tmp_path}")
    assert done.exit_code == 0 and done.stdout.startswith("2 conditions in ")
    assert read_conditions(tmp_path / "conditions.safetensors").names == ("a chair", "a boat")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["conditions", "--images=x", "--texts=y"], "expected --images or --texts, got neither or both"),
        (["conditions", "--images=nowhere"], "--images"),
        (["export"], "export: expected --run or --weights, got neither"),
        (["export", "--run=nowhere"], "--run: expected a finished run of train.py, got no tuned structure or latent in nowhere"),
        (["draw", "--weights=mesh=x"], "--weights: expected stages among structure, latent"),
        (["draw"], "--conditions: expected embeddings, got none at "),
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
    given = tokens(("a lamp", "a tree"))
    write_conditions(tmp_path / "c.safetensors", given)
    flags = [f"--pipeline={trellis_root}", f"--conditions={tmp_path / 'c.safetensors'}", "--each=2", "--device=cpu"]
    flags += [f"--weights=structure={tmp_path / 'adapter'}", f"--out={tmp_path / 'drawn'}"]
    done = run("draw", *flags)
    assert done.exit_code == 0 and "4 assets; write ranks into" in done.stdout, done.output
    assert read_conditions(tmp_path / "drawn").names == ("a lamp", "a tree")  # where `ranking` looks for them
    path = tmp_path / "drawn" / "ranking.jsonl"
    with pytest.raises(ValueError, match="line 1: expected a rank, got None"):
        read_ranking(path, pipeline)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_list(path.parent, [{**row, "rank": 2 - row["seed"]} for row in rows])
    imported = read_ranking(path, pipeline)
    assert imported.report["pairs"] == {"structure": 2, "latent": 2}
    pipeline = load_pipeline(trellis_root, given)
    pipeline.stages[0].model = tuned_model(pipeline.stages[0].model, tmp_path / "adapter")
    latents, asset = draw(pipeline, "a tree", 1)
    assert torch.equal(imported.pairs["structure"][1].preferred, latents["structure"])
    assert torch.allclose(imported.pairs["latent"][1].preferred.feats, latents["latent"].feats, atol=1e-5)
    (same,) = generate(pipeline, ["a tree"], [1])
    assert torch.equal(same.means, asset.means)
    assert torch.allclose(read_ply(path.parent / rows[3]["look_at"]).means, same.means)
    before = {p: p.stat().st_mtime_ns for p in path.parent.glob("*.ply")}
    refused = run("draw", *flags)
    assert refused.exit_code == 2 and "expected a new folder or an interrupted one" in refused.stderr and RANKING in refused.stderr
    path.unlink()  # as if it had been interrupted
    next(iter(before)).unlink()
    assert run("draw", *flags).exit_code == 0
    assert sum(p.stat().st_mtime_ns != old for p, old in before.items()) == 1 and path.read_text().count("null") == 4
    path.unlink()
    assert "assets of other networks or conditions" in run("draw", *flags[:4], flags[-1]).stderr
