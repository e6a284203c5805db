"""SAM 3D's networks: names, who sees whom, the step size; the embedder: points, and how tokens are put together."""

import pytest
import torch

from eg3d_rlhf.models.sam3d import (
    Embedder,
    LatentConfig,
    MixtureConfig,
    MixtureFlow,
    Pictures,
    PointConfig,
    PointPatches,
    VoxelFlow,
    VoxelFlowConfig,
)
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig
from tests.models.test_trellis_flows import SMALL, inputs
from tests.models.test_vit import NAMES as DINO
from tests.models.test_vit import SMALL as DINO_SIZES
from tests.models.test_vit import randomised

POSE = {"6drotation_normalized": 6, "translation": 3, "scale": 3, "translation_scale": 1}
SHARED = {"6drotation_normalized": tuple(POSE)}
LATENTS = {"shape": LatentConfig(in_channels=2, tokens=8, resolution=2)} | {
    name: LatentConfig(in_channels=channels, tokens=1) for name, channels in POSE.items()
}
SIZES = dict(
    latents=LATENTS, model_channels=12, cond_channels=5, num_blocks=2, num_heads=2, mlp_ratio=2, latent_share_transformer=SHARED,
    is_shortcut_model=True, qk_rms_norm=True,
)
GROUPS = ("shape", "6drotation_normalized")
EMBEDDER = {"mlp.0.weight": [12, 256], "mlp.0.bias": [12], "mlp.2.weight": [12, 12], "mlp.2.bias": [12]}


def block_names(i):
    found = {f"blocks.{i}.adaLN_modulation.1.weight": [72, 12], f"blocks.{i}.adaLN_modulation.1.bias": [72]}
    for g in GROUPS:
        parts = {
            f"norm2.{g}.weight": [12], f"norm2.{g}.bias": [12],
            f"self_attn.to_qkv.{g}.weight": [36, 12], f"self_attn.to_qkv.{g}.bias": [36],
            f"self_attn.q_rms_norm.{g}.gamma": [2, 6], f"self_attn.k_rms_norm.{g}.gamma": [2, 6],
            f"self_attn.to_out.{g}.weight": [12, 12], f"self_attn.to_out.{g}.bias": [12], f"cross_attn.{g}.to_q.weight": [12, 12],
            f"cross_attn.{g}.to_q.bias": [12], f"cross_attn.{g}.to_kv.weight": [24, 5], f"cross_attn.{g}.to_kv.bias": [24],
            f"cross_attn.{g}.to_out.weight": [12, 12], f"cross_attn.{g}.to_out.bias": [12], f"mlp.{g}.mlp.0.weight": [24, 12],
            f"mlp.{g}.mlp.0.bias": [24], f"mlp.{g}.mlp.2.weight": [12, 24], f"mlp.{g}.mlp.2.bias": [12],
        }  # fmt: skip
        found |= {f"blocks.{i}.{name}": shape for name, shape in parts.items()}
    return found


def latent_names():
    found = {}
    for name, one in LATENTS.items():
        own = {"input_layer.weight": [12, one.in_channels], "input_layer.bias": [12], "out_layer.weight": [one.in_channels, 12],
               "out_layer.bias": [one.in_channels], "pos_emb.pos_emb": [one.tokens, 12]}
        found |= {f"latent_mapping.{name}.{part}": shape for part, shape in own.items()}
    return found


NAMES = latent_names() | block_names(0) | block_names(1) | {
    f"{embedder}.{name}": shape for embedder in ("t_embedder", "d_embedder") for name, shape in EMBEDDER.items()
}


def flow(**changes):
    torch.manual_seed(0)
    return MixtureFlow(MixtureConfig(**{**SIZES, **changes})).eval()


def drawn(size=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(size, one.tokens, one.in_channels, generator=g) for name, one in LATENTS.items()}
    return x, torch.rand(size, generator=g), torch.randn(size, 3, 5, generator=g)


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_names_and_shapes():
    assert shapes(flow()) == NAMES
    plain = set(shapes(flow(is_shortcut_model=False)))
    assert set(NAMES) - plain == {name for name in NAMES if name.startswith("d_embedder.")}


def test_the_released_size():
    """24 blocks of width 1024 in two transformers; the paper says 1.2 billion of the whole, which is not broken down there."""
    sizes = dict(model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16, mlp_ratio=4)
    latents = LATENTS | {"shape": LatentConfig(in_channels=8, tokens=4096, resolution=16)}
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in flow(latents=latents, **{**sizes, "num_blocks": n}).parameters()) for n in (1, 2))
    assert round((one + 23 * (two - one)) / 1e9, 2) == 0.96


@torch.no_grad()
def test_the_shape_does_not_see_the_pose_and_the_pose_sees_the_shape():
    model, (x, t, cond) = flow(), drawn()
    before = model(x, t, cond)
    other = model(x | {"translation": x["translation"] + 1}, t, cond)
    assert torch.equal(before["shape"], other["shape"]) and not torch.equal(before["scale"], other["scale"])
    other = model(x | {"shape": x["shape"] + 1}, t, cond)
    assert not torch.equal(before["translation"], other["translation"])
    open_model = flow(protect_modality_list=())
    pair = (open_model(x | {"translation": x["translation"] + d}, t, cond)["shape"] for d in (0, 1))
    assert not torch.equal(*pair)


@torch.no_grad()
def test_a_sample_is_the_same_in_any_batch():
    model, (x, t, cond) = flow(), drawn(3)
    together = model(x, t, cond)
    alone = model({name: part[1:2] for name, part in x.items()}, t[1:2], cond[1:2])
    for name, part in alone.items():
        torch.testing.assert_close(part, together[name][1:2], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_step_of_no_size_is_the_plain_flow():
    model, (x, t, cond) = flow(), drawn()
    plain, none, half = model(x, t, cond), model(x, t, cond, torch.zeros(2)), model(x, t, cond, torch.full([2], 0.5))
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    assert all(not torch.equal(plain[name], half[name]) for name in plain)
    with pytest.raises(ValueError, match=r"MixtureFlow: expected no step size, since this model reads none, got \[0.5, 0.5\]"):
        flow(is_shortcut_model=False)(x, t, cond, torch.full([2], 0.5))


def test_recomputation_and_shared_modulation():
    (x, t, cond), found = drawn(), []
    for recompute in (False, True):
        model = flow(use_checkpoint=recompute, share_mod=True)
        sum(v.square().mean() for v in model(x, t, cond).values()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and "adaLN_modulation.1.weight" in shapes(model)


@torch.no_grad()
def test_the_second_flow_is_trellis_and_may_read_a_step_size():
    torch.manual_seed(0)
    trellis = LatentFlow(LatentFlowConfig(**SMALL))
    plain = VoxelFlow(VoxelFlowConfig(**SMALL))
    plain.load_state_dict(trellis.state_dict())
    x, t, cond = inputs()
    assert torch.equal(plain(x, t, cond).feats, trellis(x, t, cond).feats)
    short = VoxelFlow(VoxelFlowConfig(**SMALL, is_shortcut_model=True))
    assert {name for name in shapes(short) if name not in shapes(trellis)} == {f"d_embedder.{name}" for name in EMBEDDER}
    assert torch.equal(short(x, t, cond).feats, short(x, t, cond, torch.zeros(2)).feats)
    assert not torch.equal(short(x, t, cond).feats, short(x, t, cond, torch.full([2], 0.25)).feats)
    with pytest.raises(ValueError, match="VoxelFlow: expected no step size"):
        plain(x, t, cond, torch.zeros(2))


# SAM 3D's embedder: names, points, and how tokens are put together.


POINTS = PointConfig(input_size=8, patch_size=4, embed_dim=8, num_heads=2)


def embedder():
    frames = [("image", "cropped"), ("rgb_image", "full")], [("mask", "cropped"), ("rgb_image_mask", "full")]
    points = [("pointmap", "cropped"), ("rgb_pointmap", "full")]
    encoders = [(Pictures(DINO_SIZES, 8), 64, frames[0]), (Pictures(DINO_SIZES, 8), 64, frames[1]), (PointPatches(POINTS), 8, points)]
    return randomised(Embedder(encoders, [16, 16, 16], 5, True))


def test_names_and_shapes_of_the_embedder():
    names = shapes(embedder())
    assert {f"module_list.1.backbone.{name}": shape for name, shape in DINO.items()}.items() <= names.items()
    encoders = ("module_list.0.", "module_list.1.", "module_list.2.blocks")
    rest = {name: shape for name, shape in names.items() if not name.startswith(encoders)}
    assert rest == {
        "idx_emb": [2, 5], "module_list.2.point_proj.weight": [8, 3], "module_list.2.point_proj.bias": [8],
        "module_list.2.invalid_xyz_token": [8], "module_list.2.cls_token": [1, 1, 8], "module_list.2.pos_embed_window": [1, 17, 8],
        "module_list.2.pos_embed": [1, 8, 2, 2],
        **{f"projection_nets.{i}.0.{part}": [size] for i, size in enumerate((64, 64, 8)) for part in ("weight", "bias")},
        **{f"projection_nets.{i}.1.w{k}.weight": [16, size] for i, size in enumerate((64, 64, 8)) for k in (1, 3)},
        **{f"projection_nets.{i}.1.w2.weight": [5, 16] for i in range(3)},
    }  # fmt: skip


def test_tokens_are_the_last_norms_without_registers_or_those_before_it():
    x = torch.rand(1, 3, 8, 8)
    after, before = (randomised(Pictures(DINO_SIZES, 8, flag)) for flag in (False, True))
    tokens = after.backbone(x)
    assert torch.equal(after(x), torch.cat([tokens[:, :1], tokens[:, 3:]], 1))
    assert before(x).shape == (1, 1 + 2 + 4, 64)
    torch.testing.assert_close(before(x).mean(-1), torch.zeros(1, 7), rtol=0, atol=1e-5)
    grey = torch.rand(1, 1, 20, 20)
    assert randomised(Pictures(DINO_SIZES, 16))(grey).shape == (1, 17, 64)


def test_points_that_are_not_there_and_patches_by_themselves():
    model = randomised(PointPatches(POINTS))
    points = torch.rand(1, 3, 8, 8) + 1
    tokens = model(points)
    assert tokens.shape == (1, 4, 8)
    changed = points.clone()
    changed[:, 0, 1, 6] += 1  # row 1, column 6: of the second patch
    assert (model(changed) - tokens).abs().amax((0, 2)).gt(1e-5).tolist() == [False, True, False, False]
    one, other = points.clone(), points.clone()
    one[:, 0, 1, 6], other[:, :, 1, 6] = float("nan"), float("inf")  # whichever coordinate is missing
    assert torch.equal(model(one), model(other)) and model(one).isfinite().all() and not torch.equal(model(one), tokens)


def test_tokens_stand_behind_each_other_with_their_frame():
    model = embedder()
    given = {name: torch.rand(2, 3 if "map" in name else 1 if "mask" in name else 3, 8, 8) for name in model.names}
    tokens = model(given)
    assert tokens.shape == (2, 2 * 5 + 2 * 5 + 2 * 4, 5) and model.frames == ["cropped", "full"]
    same = model(given | {"rgb_image": given["image"]})
    torch.testing.assert_close(same[:, 5:10] - same[:, :5], (model.idx_emb[1] - model.idx_emb[0]).expand(2, 5, 5))
    with pytest.raises(ValueError, match="conditions: expected image, rgb_image, .* got no pointmap. Give them all"):
        model({name: x for name, x in given.items() if name != "pointmap"})
