"""SAM 3D's embedder: names, DINOv2 against transformers' own, points, and how tokens are put together."""

import pytest
import torch

from eg3d_rlhf.models.sam3d.embedder import Backbone, Embedder, PointConfig, PointPatches, Vision, VisionConfig, remapped

SMALL = VisionConfig(channels=64, depth=1, hidden=128, patch=4, places=1 + 4, registers=2, input_size=8)
POINTS = PointConfig(input_size=8, patch_size=4, embed_dim=8, num_heads=2)
BLOCK = {
    "norm1.weight": [64], "norm1.bias": [64], "attn.qkv.weight": [192, 64], "attn.qkv.bias": [192], "attn.proj.weight": [64, 64],
    "attn.proj.bias": [64], "norm2.weight": [64], "norm2.bias": [64], "mlp.fc1.weight": [128, 64], "mlp.fc1.bias": [128],
    "mlp.fc2.weight": [64, 128], "mlp.fc2.bias": [64], "ls1.gamma": [64], "ls2.gamma": [64],
}  # fmt: skip
VISION = {f"blocks.0.{name}": shape for name, shape in BLOCK.items()} | {
    "cls_token": [1, 1, 64], "mask_token": [1, 64], "pos_embed": [1, 5, 64], "register_tokens": [1, 2, 64],
    "patch_embed.proj.weight": [64, 3, 4, 4], "patch_embed.proj.bias": [64], "norm.weight": [64], "norm.bias": [64],
}  # fmt: skip


def randomised(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=g)
    return module.eval().requires_grad_(False)


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def embedder():
    frames = [("image", "cropped"), ("rgb_image", "full")], [("mask", "cropped"), ("rgb_image_mask", "full")]
    points = [("pointmap", "cropped"), ("rgb_pointmap", "full")]
    encoders = [(Backbone(SMALL), 64, frames[0]), (Backbone(SMALL), 64, frames[1]), (PointPatches(POINTS), 8, points)]
    return randomised(Embedder(encoders, [16, 16, 16], 5, True))


def test_names_and_shapes():
    assert shapes(Vision(SMALL)) == VISION
    state = Vision(SMALL).state_dict()
    assert VisionConfig.of(state, 8, False) == SMALL
    with pytest.raises(ValueError, match="DINOv2: expected its tensors, got none fit for 'pos_embed'"):
        VisionConfig.of({}, 8, False)
    names = shapes(embedder())
    assert {f"module_list.1.backbone.{name}": shape for name, shape in VISION.items()}.items() <= names.items()
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


def test_dinov2_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, mlp_ratio=2, image_size=8, patch_size=4, num_register_tokens=2
    )).eval()
    ours = randomised(Vision(SMALL))
    block = ours.blocks[0]
    (wq, wk, wv), (bq, bk, bv) = (part.split(64) for part in (block.attn.qkv.weight, block.attn.qkv.bias))
    layer = "encoder.layer.0."
    state = {
        "embeddings.cls_token": ours.cls_token, "embeddings.mask_token": ours.mask_token,
        "embeddings.register_tokens": ours.register_tokens,
        "embeddings.position_embeddings": ours.pos_embed, "embeddings.patch_embeddings.projection.weight": ours.patch_embed["proj"].weight,
        "embeddings.patch_embeddings.projection.bias": ours.patch_embed["proj"].bias, "layernorm.weight": ours.norm.weight,
        "layernorm.bias": ours.norm.bias, f"{layer}norm1.weight": block.norm1.weight, f"{layer}norm1.bias": block.norm1.bias,
        f"{layer}attention.attention.query.weight": wq, f"{layer}attention.attention.query.bias": bq,
        f"{layer}attention.attention.key.weight": wk, f"{layer}attention.attention.key.bias": bk,
        f"{layer}attention.attention.value.weight": wv, f"{layer}attention.attention.value.bias": bv,
        f"{layer}attention.output.dense.weight": block.attn.proj.weight, f"{layer}attention.output.dense.bias": block.attn.proj.bias,
        f"{layer}layer_scale1.lambda1": block.ls1.gamma, f"{layer}layer_scale2.lambda1": block.ls2.gamma,
        f"{layer}norm2.weight": block.norm2.weight, f"{layer}norm2.bias": block.norm2.bias,
        **{f"{layer}mlp.{name}": value for name, value in block.mlp.state_dict().items()},
    }  # fmt: skip
    theirs.load_state_dict(state)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        found = theirs(pixel_values=(x - mean) / std).last_hidden_state
    torch.testing.assert_close(ours(x), torch.cat([found[:, :1], found[:, 3:]], 1), rtol=1e-5, atol=1e-5)


def test_tokens_before_the_last_norm_keep_registers():
    config = VisionConfig(**{**vars(SMALL), "prenorm_features": True})
    model, x = randomised(Vision(config)), torch.rand(1, 3, 8, 8)
    tokens = model(x)
    assert tokens.shape == (1, 1 + 2 + 4, 64)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 7), rtol=0, atol=1e-5)


def test_positions_of_other_sizes_are_interpolated():
    model = randomised(Vision(VisionConfig(**{**vars(SMALL), "input_size": 16})))
    assert model(torch.rand(1, 3, 20, 20)).shape == (1, 17, 64) and model.positions(4).shape == (1, 17, 64)
    assert torch.equal(model.positions(2), model.pos_embed)


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


def test_remapped():
    points = torch.tensor([[1.0, -2.0, 2.0]])
    assert torch.equal(remapped(points, "linear"), points) and torch.equal(remapped(points, "sinh"), points.asinh())
    torch.testing.assert_close(remapped(points, "exp"), torch.tensor([[0.5, -1.0, 0.6931472]]))


def test_tokens_stand_behind_each_other_with_their_frame():
    model = embedder()
    given = {name: torch.rand(2, 3 if "map" in name else 1 if "mask" in name else 3, 8, 8) for name in model.names}
    tokens = model(given)
    assert tokens.shape == (2, 2 * 5 + 2 * 5 + 2 * 4, 5) and model.frames == ["cropped", "full"]
    same = model(given | {"rgb_image": given["image"]})
    torch.testing.assert_close(same[:, 5:10] - same[:, :5], (model.idx_emb[1] - model.idx_emb[0]).expand(2, 5, 5))
    with pytest.raises(ValueError, match="conditions: expected image, rgb_image, .* got no pointmap. Give them all"):
        model({name: x for name, x in given.items() if name != "pointmap"})


@pytest.mark.parametrize(("kind", "changes"), [(VisionConfig, {**vars(SMALL), "channels": 65}), (PointConfig, {"remap_output": "cube"})])
def test_sizes_that_are_refused(kind, changes):
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected"):
        kind(**changes)
