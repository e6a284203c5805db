"""Commands on TRELLIS's folders: pairs of assets and of DSO's samples, and exports of tuned networks."""

import copy
import json
import re
import shlex

import pytest
import torch

from eg3d_rlhf.experiments.run import OPTIONS
from eg3d_rlhf.models.lora import add_lora
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import save_policy, tuned_model
from eg3d_rlhf.tuning.flow.base.conditioning import read_conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from eg3d_rlhf.tuning.flow.families.trellis_assets import read_ply
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw, make_sampling
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
    write_conditioning(tmp_path / "c.safetensors", tokens())
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
    printed = flow("tune", work.folder, f"--labels={samples}", "--pairs-only")
    assert re.search(r"\b3 .*\bstructure\b", printed) and not stale.exists()
    assert read_conditioning(work.folder / "pairs" / "conditioning.safetensors").names == ("000", "001")


def test_tuned_networks_are_found_for_export(pipeline, trellis_root, tmp_path):
    """Tuned networks are found in the run of a stage, in a folder named after the stage, or in one run for
    each stage. A path that is named for a stage has priority.
    """
    for run, stage in (("first_run", "structure"), ("second_run", "latent")):
        adapted(pipeline, tmp_path / run / stage, stage=["structure", "latent"].index(stage))
        (tmp_path / run / OPTIONS).write_text(
            json.dumps({"run": {"source": {"pipeline": str(trellis_root)}}})
        )
    weights = f"--weights=structure={tmp_path / 'first_run' / 'structure'}"
    root = f"--pipeline={trellis_root}"
    calls = {
        "a": [tmp_path / "first_run"],
        "b": [root, weights],
        "c": [tmp_path / "first_run", tmp_path / "second_run"],
    }
    for name, flags in calls.items():
        printed = flow("export", *flags, f"--outdir={tmp_path / name}")
        tuned = re.findall(r"^stage (\w+): .*\.safetensors", printed, re.MULTILINE)
        assert tuned == ["structure", *(["latent"] if name == "c" else [])] and "{" not in printed
        # the update of the second run is large enough for float16, too
        assert "from_pretrained" in printed.splitlines()[-1] and "warning" not in printed
    merged = [(tmp_path / name / "ckpts" / "ss_flow.safetensors").read_bytes() for name in calls]
    assert (
        merged[0] == merged[1] == merged[2] != (trellis_root / "ckpts" / "ss_flow.safetensors").read_bytes()
    )
    flow(
        "export",
        tmp_path / "first_run",
        tmp_path / "second_run",
        "--adapter",
        f"--outdir={tmp_path / 'adapters'}",
    )
    assert (tmp_path / "adapters/latent/adapter_model.safetensors").read_bytes() == (
        tmp_path / "second_run/latent/adapter_model.safetensors"
    ).read_bytes()
    (tmp_path / "other").mkdir()
    empty = [tmp_path / "first_run", f"--weights=structure={tmp_path / 'other'}"]
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
def test_exports_of_nothing_are_rejected(trellis_root, tmp_path, flags, names):
    filled = [flag.replace("ROOT", str(trellis_root)) for flag in flags]
    check_message(flow("export", *filled, f"--outdir={tmp_path / 'out'}", code=2), names)
    assert not (tmp_path / "out").exists()


def test_labels_of_nothing_are_rejected(work, tmp_path):
    (tmp_path / "empty").mkdir()
    labels = f"--labels={tmp_path / 'empty'}"
    line = flow("tune", work.folder, labels, "--pairs-only", code=2)
    check_message(line, ("DSO", "model_info.npz", str(tmp_path / "empty")))


def test_ranked_samples_become_pairs_of_their_latents(pipeline, trellis_root, work, tmp_path):
    """Assets are sampled and ranked; the pairs contain exactly the latents that were sampled."""
    adapted(pipeline, tmp_path / "adapter")
    sampling_task = make_sampling(
        work,
        work.check_pipeline(),
        "base",
        SHOWN,
        torch.device("cpu"),
        tuned_weights={"structure": tmp_path / "adapter"},
    )
    assert sampling_task.run().count == 10
    path = work.asset_folder() / "ranking.jsonl"
    with raising("line 1", "rank", "None"):
        read_ranking(path, pipeline)
    rows = work.lines()
    write_list(path.parent, [{**row, "rank": 2 - row["seed"]} for row in rows])
    printed = flow("tune", work.folder, f"--labels={work.asset_folder()}", "--pairs-only")
    assert re.search(r"\b5 .*\bstructure\b.*\b5 .*\blatent\b", printed)
    # with WORK's embeddings
    problem = open_problem(ProblemSource(pipeline=str(trellis_root), pairs=str(work.folder / "pairs")))
    assert {*problem.train_prompts, *problem.held_out_prompts} <= set(work.names(*SHOWN))
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


@pytest.mark.parametrize("is_whole", [False, True])
def test_an_update_that_rounding_removes_is_warned_of_with_the_remedy(
    pipeline, trellis_root, tmp_path, is_whole
):
    """Changes far below the spacing of float16. The adapter keeps them, and is the printed next step."""
    stage = pipeline.stages[0]
    model = copy.deepcopy(stage.model)
    if not is_whole:
        add_lora(model, LoraConfig(rank=2, alpha=4, targets=stage.lora_targets), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_whole or "lora_B" in name:
                parameter += 1e-7 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
    run = tmp_path / "RUN"
    save_policy(model, run / "structure", {})
    (run / OPTIONS).write_text(json.dumps({"run": {"source": {"pipeline": str(trellis_root)}}}))
    printed = flow("export", run, f"--outdir={tmp_path / 'TUNED'}")
    (warning,) = [line for line in printed.splitlines() if line.startswith("warning: ")]
    lost = float(re.search(r"([\d.]+)% of", warning).group(1))
    assert lost > 60 and "structure" in warning and "float16" in warning
    last = printed.splitlines()[-1]
    if is_whole:
        assert "from_pretrained" in last
        return
    words = shlex.split(last.removeprefix("next: "))
    assert words[:3] == ["eg3d-rlhf", "flow", "export"]
    flow("export", *words[3:])
    assert (tmp_path / "TUNED-adapter" / "structure" / "adapter_model.safetensors").is_file()
