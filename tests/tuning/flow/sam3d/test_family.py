"""SAM 3D Objects as a family: what it is told, one DPO step, its checkpoint with adapters merged, and the documented round trip."""

import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eg3d_rlhf.models.lora import LoraConfig, adapted_layers, add_lora, lora_parameters
from eg3d_rlhf.models.policies import read_weights, save_policy, tuned_model
from eg3d_rlhf.models.sparse import NamedSample
from eg3d_rlhf.tuning.flow.conditions import read_conditions
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families.sam3d import files
from eg3d_rlhf.tuning.flow.families.sam3d import pipeline as family
from eg3d_rlhf.tuning.flow.families.sam3d.pipeline import cut, inputs_of, load_pipeline, squared
from eg3d_rlhf.tuning.flow.generate import generate, sample
from eg3d_rlhf.tuning.flow.pairs import read_pairs
from tests.tuning.flow.documented_commands import run_section
from tests.tuning.flow.one_step import check_one_dpo_step
from tests.tuning.flow.refused import refusal, write_people
from tests.tuning.flow.sam3d.tiny_sam3d import NAMES, POSE, W, changed, tokens


def write_picture(folder, name, shade=90):
    """A picture whose opacity is the object's mask, and its point map."""
    folder.mkdir(exist_ok=True)
    pixels = np.full((20, 30, 4), shade, np.uint8)
    pixels[..., 3] = 0
    pixels[5:15, 8:20, 3] = 255
    Image.fromarray(pixels, "RGBA").save(folder / f"{name}.png")
    y, x = np.mgrid[0:20, 0:30].astype(np.float32)
    points = np.stack([x / 10 - 1, y / 10 - 1, np.full_like(x, 4)], 2)
    points[0, 0] = np.nan
    np.save(folder / f"{name}.npy", points)
    return folder / f"{name}.png"


def test_what_the_embedder_is_told(sam3d_root, tmp_path):
    path = write_picture(tmp_path / "PICTURES", "a")
    embedder = files.load_embedder(files.read_pipeline(sam3d_root).generators["structure"])
    given = inputs_of(path, embedder)
    assert {n: list(t.shape) for n, t in given.items()} == {
        "rgb_image": [1, 3, 30, 30], "rgb_image_mask": [1, 1, 30, 30], "image": [1, 3, 14, 14], "mask": [1, 1, 14, 14],
        "rgb_pointmap": [1, 3, 30, 30], "pointmap": [1, 3, 14, 14],
    }
    assert given["mask"].sum() == given["rgb_image_mask"].sum() == 10 * 12
    assert torch.equal(given["mask"][0, 0].any(1).nonzero()[[0, -1], 0], torch.tensor([2, 11]))  # in the middle
    assert float(given["pointmap"][:, 2].nanmedian()) == 1 and given["rgb_pointmap"][0, :, 5, 0].isnan().all()
    assert embedder(given).shape == (1, 2 * 7 + 2 * 7 + 2 * 4, W)
    corner, mask = torch.arange(6.0).view(1, 2, 3), torch.tensor([[[0.0, 0, 1], [0, 0, 0]]])
    assert cut(corner, mask, -1.0).tolist() == [[[2.0]]] and squared(corner, -1.0)[0, 2].tolist() == [-1, -1, -1]
    (tmp_path / "PICTURES" / "a.npy").unlink()
    with pytest.raises(FileNotFoundError, match="conditions: expected a point map at .*a.npy, got none"):
        inputs_of(path, embedder)
    np.save(tmp_path / "PICTURES" / "a.npy", np.full((20, 30, 3), -1, np.float32))
    with pytest.raises(ValueError, match="in front of the camera"):
        inputs_of(path, embedder)
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match="expected the object's mask as opacity"):
        inputs_of(path, embedder)


@pytest.mark.parametrize("name", files.STAGES)
def test_one_dpo_step(pipeline, name):
    model = check_one_dpo_step(pipeline, name, NAMES[:2])
    if name == "structure":
        expected = {f"blocks.0.self_attn.{layer}.{g}" for layer in ("to_qkv", "to_out") for g in ("shape", "6drotation_normalized")}
        assert {n for n in adapted_layers(model) if "self_attn" in n} == expected and len(adapted_layers(model)) == 10


def adapted(pipeline, folder, seed=1):
    """An adapter on the first stage that does something; returns the tuned network."""
    stage = pipeline.stages[0]
    model = copy.deepcopy(stage.model)
    add_lora(model, LoraConfig(rank=2, targets=stage.lora_targets), seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    save_policy(model, folder, {})
    return model.eval()


def test_adapters_are_saved_and_merged_into_the_larger_checkpoint(pipeline, sam3d_root, tmp_path):
    model, stage = adapted(pipeline, tmp_path / "adapter"), pipeline.stages[0]
    assert len(read_weights(tmp_path / "adapter").adapters) == 10
    again = tuned_model(stage.model, tmp_path / "adapter")
    report = family.export(sam3d_root, tmp_path / "out", {"structure": tmp_path / "adapter"})
    assert report["tuned"]["structure"]["file"] == "ss_generator.ckpt" and 0 < report["tuned"]["structure"]["rounding"] < 0.01
    assert len(report["kept"]) == 8
    old, new = (torch.load(root / "ss_generator.ckpt", weights_only=True) for root in (sam3d_root, tmp_path / "out"))
    assert new["epoch"] == 3 and {k: (t.dtype, t.shape) for k, t in old["state_dict"].items()} == {
        k: (t.dtype, t.shape) for k, t in new["state_dict"].items()
    }
    differ = {k for k in old["state_dict"] if not torch.equal(old["state_dict"][k], new["state_dict"][k])}
    assert differ == {f"{files.FLOW}{name}.weight" for name in adapted_layers(model)}
    opened = load_pipeline(tmp_path / "out", tokens())
    noise, cond = stage.noise([1], [None]), pipeline.conditions(NAMES[:1], "structure")
    with torch.no_grad():
        x = [stage.velocity(noise, torch.tensor([0.7]), cond, m).feats for m in (model, again, opened.stages[0].model, stage.model)]
    assert torch.equal(x[0], x[1])
    torch.testing.assert_close(x[2], x[0], atol=1e-2 * float(x[0].abs().max()), rtol=0)
    assert (x[3] - x[0]).abs().max() > 10 * (x[2] - x[0]).abs().max()
    with pytest.raises(ValueError, match="export: expected stages among structure, latent, got pose"):
        family.export(sam3d_root, tmp_path / "out2", {"pose": tmp_path})


def test_a_tuned_network_is_sampled_with_its_step_size(pipeline, sam3d_root, tmp_path):
    root = changed(shutil.copytree(sam3d_root, tmp_path / "root"), "pipeline.yaml", lambda c: c.update(use_stage1_distillation=True))
    adapted(pipeline, tmp_path / "adapter")
    stage = load_pipeline(root, tokens()).stages[0]
    tuned, noise = tuned_model(stage.model, tmp_path / "adapter"), stage.noise([1], [None])
    cond = pipeline.conditions(NAMES[:1], "structure")
    base = sample(stage, noise, cond, None)
    stage.model = tuned
    assert stage.sampling.shortcut and not torch.allclose(sample(stage, noise, cond, None).feats, base.feats)


@pytest.mark.long
def test_the_documented_round_trip(sam3d_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(NAMES):
        write_picture(tmp_path / "PICTURES", name, 60 * i)
    called = run_section("SAM 3D Objects", sam3d_root, tmp_path)
    assert called == ["conditions", "draw", "ranking", "train", "export"]
    read = read_conditions(tmp_path / "PAIRS")
    assert read.form == {"latent": [28, W], "structure": [36, W]} and set(read.names) == set(NAMES)
    first = read_pairs(tmp_path / "PAIRS" / "structure")[0][0].preferred
    assert isinstance(first, NamedSample) and set(first.tensors) == {"shape", *POSE}
    base, tuned = (load_pipeline(root, read) for root in (sam3d_root, tmp_path / "TUNED"))
    same = [all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
            for one, other in zip(base.stages, tuned.stages, strict=True)]
    assert same == [False, True] and family_of(tmp_path / "TUNED").name == "sam3d"
    assert generate(tuned, NAMES[:1], [0])[0].means.isfinite().all()


def test_what_train_refuses(sam3d_root, tmp_path):
    root = shutil.copytree(sam3d_root, tmp_path / "root")
    shapes = {"shape": (64, 2)} | {name: (1, channels) for name, channels in POSE.items()}
    g = torch.Generator().manual_seed(0)
    both = [NamedSample({n: torch.randn(shape, generator=g) for n, shape in shapes.items()}) for _ in range(2)]
    people = write_people(tmp_path / "a", "structure", *both, tokens())
    others = write_people(tmp_path / "b", "structure", *both, tokens(size=7))
    assert "got {'latent': [3, 7], 'structure': [4, 7]} of random." in refusal(
        root, others, "structure", tmp_path
    )
    grids = write_people(tmp_path / "c", "structure", torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 4), tokens())
    assert "preferred: expected tensors by name, got a dense grid" in refusal(root, grids, "structure", tmp_path)
    changed(root, "ss_generator.yaml", lambda c: c["module"]["generator"]["backbone"].update(reversed_timestamp=True))
    assert "expected data at t = 1, got reversed_timestamp on" in refusal(root, people, "structure", tmp_path)
    changed(root, "ss_generator.yaml", lambda c: None)
    state = torch.load(root / "ss_generator.ckpt", weights_only=True)["state_dict"]
    torch.save({"state_dict": {n.replace(".cross_attn.", ".attn2."): t for n, t in state.items()}}, root / "ss_generator.ckpt")
    said = refusal(root, people, "structure", tmp_path)
    first = [f"blocks.0.cross_attn.{g}.{part}" for g in ("6drotation_normalized", "shape") for part in (
        "to_kv.bias", "to_kv.weight", "to_out.bias", "to_out.weight", "to_q.bias", "to_q.weight"
    )][:8]
    assert f"missing: {', '.join(first)} ...; unexpected: " in said
