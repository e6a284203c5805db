"""Export of tuned flows to the published layout."""

import copy
import json
import shutil

import torch
from safetensors.torch import load_file

from eg3d_rlhf.models.lora import add_lora
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import save_policy
from eg3d_rlhf.tuning.flow.base.export import export
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from eg3d_rlhf.tuning.flow.families.trellis_files import LATENT, STRUCTURE, load_model
from tests.modes.flow_works import flow
from tests.rejections import check_message
from tests.tuning.flow.families.trellis.tiny_trellis import PIPELINE, tokens


def adapted(pipeline, folder, stage=0):
    """Add an adapter that changes the output to a stage, write it, and return the tuned network."""
    stage = pipeline.stages[stage]
    model = copy.deepcopy(stage.model)
    add_lora(model, LoraConfig(rank=2, alpha=4, targets=stage.lora_targets), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_policy(model, folder, {})
    return model.eval()


def velocity(model, cond):
    x_t = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(x_t, torch.tensor([0.2, 0.9]), cond)


def test_adapters_are_merged_and_the_rest_is_kept(pipeline, trellis_root, tmp_path):
    model = adapted(pipeline, tmp_path / "adapter")
    report = export(
        family_of(trellis_root), trellis_root, tmp_path / "out", {STRUCTURE: tmp_path / "adapter"}
    )
    assert report["elsewhere"] == ["slat_decoder_mesh"]
    # stock TRELLIS needs them not, the loop does
    encoders = {"ss_enc_conv3d_16l8_fp16", "slat_enc_swin8_B_64l8_fp16"}
    stems = {"slat_flow", "ss_dec", "slat_dec_gs", *encoders}
    files = {f"ckpts/{stem}{ending}" for stem in stems for ending in (".json", ".safetensors")}
    assert set(report["kept"]) == files | {"ckpts/ss_flow.json"}
    assert (
        report["tuned"][STRUCTURE]["file"] == "ckpts/ss_flow.safetensors"
        and 0 < report["tuned"][STRUCTURE]["rounding"] < 0.01
    )
    assert json.loads((tmp_path / "out" / "pipeline.json").read_text()) == PIPELINE
    old, new = (
        load_file(root / "ckpts" / "ss_flow.safetensors") for root in (trellis_root, tmp_path / "out")
    )
    assert {k: (t.dtype, t.shape) for k, t in old.items()} == {k: (t.dtype, t.shape) for k, t in new.items()}
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed and all(
        k.endswith((".to_qkv.weight", ".to_q.weight", ".to_kv.weight", ".to_out.weight")) for k in changed
    )
    cond = pipeline.tokens.select(["a lamp", "a tree"])
    merged = load_model(tmp_path / "out" / "ckpts" / "ss_flow", dtype=torch.float32)
    base = velocity(pipeline.stages[0].model, cond)
    assert torch.allclose(velocity(merged, cond), velocity(model, cond), atol=2e-3 * float(base.abs().max()))
    assert not torch.allclose(velocity(merged, cond), base, atol=1e-2)


def test_a_whole_tuned_network(pipeline, trellis_root, tmp_path):
    model = copy.deepcopy(pipeline.stages[1].model)
    with torch.no_grad():
        model.out_layer.bias += 1
    save_policy(model, tmp_path / "full", {})
    report = export(family_of(trellis_root), trellis_root, tmp_path / "out", {LATENT: tmp_path / "full"})
    # whole networks are rounded, too: the share is that of the bias, whose file is float16
    assert 0 <= report["tuned"][LATENT]["rounding"] < 1e-3
    opened = FAMILY.load(tmp_path / "out", tokens())  # whole: with its encoders
    assert torch.equal(opened.stages[1].model.out_layer.bias, model.out_layer.bias)
    assert torch.equal(
        opened.advance(STRUCTURE, torch.ones(1, 2, 4, 4, 4))[0],
        pipeline.advance(STRUCTURE, torch.ones(1, 2, 4, 4, 4))[0],
    )
    assert torch.equal(
        opened.part("slat_encoder").out_layer.weight, pipeline.part("slat_encoder").out_layer.weight
    )


def test_missing_encoders_are_listed_as_elsewhere(pipeline, trellis_root, tmp_path):
    adapted(pipeline, tmp_path / "adapter")
    root = shutil.copytree(trellis_root, tmp_path / "root")
    for path in root.glob("ckpts/*enc*"):
        path.unlink()
    report = export(family_of(root), root, tmp_path / "out", {STRUCTURE: tmp_path / "adapter"})
    assert report["elsewhere"] == ["slat_decoder_mesh", "sparse_structure_encoder", "slat_encoder"]


def test_a_rejected_export_leaves_nothing_and_alpha_can_be_stated(pipeline, trellis_root, tmp_path):
    adapted(pipeline, tmp_path / "adapter")
    out = tmp_path / "out"
    command = (
        f"--pipeline={trellis_root}",
        f"--weights={STRUCTURE}={tmp_path / 'adapter'}",
        f"--outdir={out}",
    )
    (tmp_path / "adapter" / "adapter_config.json").rename(tmp_path / "kept.json")
    for flags, names in (
        ((), ("adapter_model.safetensors", "--set alpha=")),
        (("--adapter",), ("--adapter", "adapter_config.json")),
        (("--adapter", "--set=alpha=4"), ("--adapter", "alpha")),
    ):
        check_message(flow("export", *command, *flags, code=2), names)
        assert not out.exists()
    out.mkdir()  # an empty folder stays
    flow("export", *command, code=2)
    assert out.is_dir() and not list(out.iterdir())
    flow("export", *command, "--set=alpha=4")
    (tmp_path / "kept.json").rename(tmp_path / "adapter" / "adapter_config.json")
    stated = load_file(out / "ckpts" / "ss_flow.safetensors")
    shutil.rmtree(out)
    flow("export", *command)
    recorded = load_file(out / "ckpts" / "ss_flow.safetensors")
    assert all(torch.equal(stated[name], recorded[name]) for name in recorded)
