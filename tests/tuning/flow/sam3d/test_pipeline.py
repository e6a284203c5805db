"""SAM 3D's folder: what is read, both stages, steps of a size, what is refused."""

import shutil

import pytest
import torch

from eg3d_rlhf.models.sparse import NamedBatch, NamedSample, mean_per_sample
from eg3d_rlhf.tuning.flow.families.sam3d import files
from eg3d_rlhf.tuning.flow.families.sam3d.pipeline import load_pipeline, pruned
from eg3d_rlhf.tuning.flow.generate import generate, sample
from eg3d_rlhf.tuning.flow.stage import Sampling
from tests.tuning.flow.sam3d.tiny_sam3d import NAMES, POSE, W, changed, tokens


@pytest.fixture
def copied(sam3d_root, tmp_path):
    return shutil.copytree(sam3d_root, tmp_path / "root")


def state_of(root, stage):
    return torch.load(root / f"{stage}_generator.ckpt", weights_only=True)["state_dict"]


def test_what_the_files_say(sam3d_root):
    file = files.read_pipeline(sam3d_root)
    assert file.sampling["structure"] == Sampling(steps=2, cfg_strength=7.0, cfg_interval=(0.5, 1.0), rescale_t=3.0)
    assert file.sampling["latent"].cfg_strength == 1.0 and file.mean[0] == 0.5 and file.prune == 1
    config = file.generators["structure"].config
    assert list(config.latents) == ["shape", *POSE] and config.latents["shape"].tokens == 64
    assert config.groups == {"shape": ("shape",), "6drotation_normalized": tuple(POSE)} and config.is_shortcut_model
    assert file.generators["structure"].sigma_min == 0.0 and len(file.files) == 9


@pytest.mark.parametrize("stage", ["structure", "latent"])
def test_networks_are_loaded_from_under_their_prefix(sam3d_root, stage):
    generator = files.read_pipeline(sam3d_root).generators[stage]
    stored = {n.removeprefix(files.FLOW): t for n, t in state_of(sam3d_root, files.SHORT[stage]).items() if n.startswith(files.FLOW)}
    state = files.load_flow(generator).state_dict()
    assert set(state) == set(stored) and all(torch.equal(state[n], stored[n]) and state[n].dtype == stored[n].dtype for n in stored)
    half = {name for name, tensor in stored.items() if tensor.dtype == torch.float16}
    types = {name: tensor.dtype for name, tensor in files.load_flow(generator, torch.bfloat16).state_dict().items()}
    assert half and types == {name: torch.bfloat16 if name in half else torch.float32 for name in stored}
    embedder = files.load_embedder(generator)
    assert embedder.names[:4] == ["image", "rgb_image", "mask", "rgb_image_mask"]
    assert embedder.names[4:] == (["pointmap", "rgb_pointmap"] if stage == "structure" else [])


def test_tensors_that_are_refused(copied):
    generator = files.read_pipeline(copied).generators["structure"]
    state = state_of(copied, "ss")
    torch.save({"state_dict": {n.replace(".cross_attn.", ".attn2."): t for n, t in state.items()}}, generator.checkpoint)
    with pytest.raises(ValueError, match=r"missing: blocks.0.cross_attn.6drotation_normalized.to_kv.bias, .* unexpected: blocks.0.attn2"):
        files.load_flow(generator)
    torch.save({n.removeprefix("_base_models."): t for n, t in state.items()}, generator.checkpoint)
    with pytest.raises(ValueError, match=r"expected tensors under _base_models.generator.reverse_fn.backbone., got condition_embedder."):
        files.load_flow(generator)
    name = f"{files.FLOW}latent_mapping.scale.input_layer.weight"
    torch.save({"state_dict": state | {name: torch.zeros(12, 4)}}, generator.checkpoint)
    with pytest.raises(ValueError, match=r"misshapen: latent_mapping.scale.input_layer.weight \[12, 4\] instead of \[12, 3\]"):
        files.load_flow(generator)
    torch.save({"state_dict": {n: t for n, t in state.items() if "w1" not in n}}, generator.checkpoint)
    with pytest.raises(ValueError, match=r"expected the embedder of SAM 3D, got none fit for 'projection_nets.0.1.w1.weight'"):
        files.load_embedder(generator)


def turn_time(content):
    content["module"]["generator"]["backbone"]["reversed_timestamp"] = True


def other_generator(content):
    content["module"]["generator"]["backbone"]["_target_"] = "sam3d_objects.model.backbone.generator.ddpm.Diffusion"


def network(content):
    return content["module"]["generator"]["backbone"]["reverse_fn"]["backbone"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("ss_generator.yaml", turn_time, "ss_generator.yaml: expected data at t = 1, got reversed_timestamp on"),
        ("ss_generator.yaml", other_generator, "expected a generator ShortCut or FlowMatching of sam3d_objects, got .*Diffusion"),
        ("ss_generator.yaml", lambda c: network(c).update(colour=2), r"got unknown \['colour'\], missing \[\]"),
        ("ss_generator.yaml", lambda c: network(c).pop("num_blocks"), r"got unknown \[\], missing \['num_blocks'\]"),
        ("ss_generator.yaml", lambda c: c.pop("module"), "expected module.generator.backbone with reverse_fn.backbone"),
        ("slat_generator.yaml", lambda c: network(c).update(pe_mode="rope"), "slat_generator.yaml: .*expected pe_mode 'ape', got 'rope'"),
        ("pipeline.yaml", lambda c: c.update(ss_cfg_strength_pm=1.0), "expected ss_cfg_strength_pm 0, got another"),
        ("pipeline.yaml", lambda c: c.update(slat_std=[0.0] * 4), "expected slat_mean and slat_std per channel"),
        ("pipeline.yaml", lambda c: c.update(ss_cfg_interval=[0, 5000]), "pipeline.yaml, ss: Sampling: expected"),
    ],
)
def test_files_that_are_refused(copied, file, change, message):
    with pytest.raises(ValueError, match=message):
        files.read_pipeline(changed(copied, file, change))


def test_files_that_are_missing(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected SAM 3D's pipeline.yaml, got none in"):
        files.read_pipeline(tmp_path)
    (copied / "ss_decoder.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="expected ss_decoder_ckpt_path to name a file, got 'ss_decoder.ckpt'"):
        files.read_pipeline(copied)


def test_the_stages(pipeline):
    structure, latent = pipeline.stages
    assert structure.data_at_one and latent.data_at_one
    noise = structure.noise([1, 2], [None, None])
    assert {n: list(t.shape) for n, t in noise.tensors.items()} == {"shape": [2, 64, 2]} | {n: [2, 1, c] for n, c in POSE.items()}
    voxels = pipeline.advance("structure", noise)
    assert all(v.shape[1] == 3 and int(v.max()) < 8 for v in voxels)
    asset = pipeline.decode(latent.noise([1, 2], voxels))[0]
    assert len(asset.means) == 4 * len(voxels[0]) and asset.means.isfinite().all()
    assert pipeline.conditions(NAMES[:2], "structure").shape == (2, 4, W) and pipeline.no_condition(2, "latent").shape == (2, 3, W)
    assert generate(pipeline, NAMES[:1], [0])[0].means.isfinite().all()
    with pytest.raises(ValueError, match="advance: expected stage 'structure', got 'latent'"):
        pipeline.advance("latent", noise)
    with pytest.raises(ValueError, match="expected no assets to encode"):
        pipeline.encode([])


def test_the_error_of_a_dictionary_is_the_mean_over_its_parts():
    """Each part's own mean counts alike: 128 numbers of the shape no more than one of the pose."""
    g = torch.Generator().manual_seed(0)
    x = NamedBatch({"shape": torch.randn(3, 64, 2, generator=g), "scale": torch.randn(3, 1, 3, generator=g)})
    error = mean_per_sample(x.feats.square(), x)
    parts = [part.double().square().flatten(1).mean(1) for part in x.tensors.values()]
    torch.testing.assert_close(error.double(), sum(parts) / 2, rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_velocity_is_the_networks_own_read_from_the_other_end(pipeline):
    stage = pipeline.stages[0]
    x, t, cond = stage.noise([3], [None]), torch.tensor([0.2]), pipeline.conditions(NAMES[:1], "structure")
    v, own = stage.velocity(x, t, cond), stage.model(x.tensors, 1 - t, cond)
    assert all(torch.equal(v[name], -own[name]) for name in own)
    none, half = stage.velocity(x, t, cond, step=0.0), stage.velocity(x, t, cond, step=0.5)
    assert torch.equal(none.feats, v.feats) and not torch.equal(half.feats, v.feats)


@torch.no_grad()
def test_sampling_with_steps_of_a_size(copied):
    """Distilled: the network is told 1 / steps, there is no guidance; with d = 0 the same network samples the plain flow."""
    opened = load_pipeline(changed(copied, "pipeline.yaml", lambda c: c.update(use_stage1_distillation=True)), tokens())
    stage, cond = opened.stages[0], opened.conditions(NAMES[:1], "structure")
    assert stage.sampling == Sampling(steps=2, cfg_strength=0.0, cfg_interval=(0.5, 1.0), rescale_t=3.0, shortcut=True)
    noise = stage.noise([7], [None])
    x, points = noise.feats, [1.0, 0.75, 0.0]
    for t, until in zip(points, points[1:], strict=False):
        own = stage.model(noise.with_feats(x).tensors, torch.tensor([1 - t]), cond, torch.tensor([0.5]))
        x = x + (t - until) * noise.like(own).feats
    torch.testing.assert_close(sample(stage, noise, cond, None).feats, x, rtol=1e-5, atol=1e-6)
    plain = Sampling(steps=2, cfg_strength=0.0, rescale_t=3.0)
    assert not torch.allclose(sample(stage, noise, cond, None, plain).feats, x)
    assert opened.stages[1].sampling.cfg_strength == 1 and not opened.stages[1].sampling.shortcut


def test_inner_voxels_are_left_out():
    cube = torch.cartesian_prod(*[torch.arange(5)] * 3).int()
    assert len(pruned(cube, 0)) == 125 and len(pruned(cube, 1)) == 125 - 27 and len(pruned(cube, 2)) == 124
    assert torch.equal(pruned(cube[:25], 1), cube[:25])  # one layer: all are at the surface


def test_conditions_and_latents_that_are_refused(sam3d_root, pipeline):
    for given in (tokens(size=7), type(tokens())(tokens={n: torch.zeros(4, W) for n in NAMES}, zero_null=True)):
        with pytest.raises(ValueError, match=r"conditions: expected tokens \[L, 6\] named 'structure' .*with these checkpoints"):
            load_pipeline(sam3d_root, given)
    structure, latent = pipeline.stages
    one = {n: t[0] for n, t in structure.noise([0], [None]).tensors.items()}
    structure.check("x", NamedSample(one))
    for wrong, message in (
        (torch.zeros(2, 4, 4, 4), "x: expected tensors by name, got a dense grid. It is no latent of stage 'structure'"),
        (NamedSample({n: t for n, t in one.items() if n != "scale"}), "x: expected tensors 6drotation_normalized, scale, shape"),
        (NamedSample(one | {"scale": torch.zeros(2, 3)}), r"x, scale: expected \[1, 3\], got \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            structure.check("x", wrong)
    with pytest.raises(ValueError, match="x: expected voxels, got tensors by name"):
        latent.check("x", NamedSample(one))
