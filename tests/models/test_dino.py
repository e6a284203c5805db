"""Vision transformers against a formula of our own and transformers' networks; names and files of DINOv2."""

import math

import pytest
import torch

from eg3d_rlhf.models.vit import MEAN, STD, Dino, DinoConfig, hub_names, load_dino
from tests.rejections import raising
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import transformers_names

SMALL = DinoConfig(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    mlp_ratio=2,
    image_size=8,
    patch_size=4,
    num_register_tokens=2,
)
BLOCK = {
    "norm1.weight": [64],
    "norm1.bias": [64],
    "attn.qkv.weight": [192, 64],
    "attn.qkv.bias": [192],
    "attn.proj.weight": [64, 64],
    "attn.proj.bias": [64],
    "norm2.weight": [64],
    "norm2.bias": [64],
    "mlp.fc1.weight": [128, 64],
    "mlp.fc1.bias": [128],
    "mlp.fc2.weight": [64, 128],
    "mlp.fc2.bias": [64],
    "ls1.gamma": [64],
    "ls2.gamma": [64],
}
NAMES = {f"blocks.0.{name}": shape for name, shape in BLOCK.items()} | {
    "cls_token": [1, 1, 64],
    "mask_token": [1, 64],
    "pos_embed": [1, 5, 64],
    "register_tokens": [1, 2, 64],
    "patch_embed.proj.weight": [64, 3, 4, 4],
    "patch_embed.proj.bias": [64],
    "norm.weight": [64],
    "norm.bias": [64],
}


def randomised(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=g)
    return module.eval().requires_grad_(False)


def test_names_are_those_of_torch_hub_and_sizes_those_of_the_tensors():
    state = Dino(SMALL).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == NAMES and DinoConfig.of_state(
        state, "x"
    ) == SMALL
    assert SMALL.tokens == 7
    with raising("'cls_token'"):
        DinoConfig.of_state({}, "x")
    for changes, name in (({"hidden_act": "relu"}, "'relu'"), ({"image_size": 9}, "image_size=9")):
        with raising(name):
            DinoConfig.of({**vars(SMALL), **changes})


def test_a_file_of_transformers_is_the_same_network():
    ours = randomised(Dino(SMALL))
    theirs = transformers_names(ours)
    again = hub_names(theirs)
    assert again.keys() == NAMES.keys() and all(
        torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items()
    )
    assert torch.equal(load_dino(SMALL, again, "x")(x := torch.rand(1, 3, 8, 8)), ours(x))
    del theirs["encoder.layer.0.attention.attention.key.bias"]
    with raising("missing: blocks.0.attn.qkv.bias", "query.bias"):
        load_dino(SMALL, hub_names(theirs), "x")


def test_dino_is_its_formula():
    """Of one layer and one head, step by step; registers stand behind the first token."""
    model = randomised(
        Dino(DinoConfig.of({**vars(SMALL), "hidden_size": 4, "image_size": 4, "patch_size": 2})).double()
    )
    picture = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    x = (picture[0] - picture.new_tensor(MEAN)[:, None, None]) / picture.new_tensor(STD)[:, None, None]
    weight = model.patch_embed.proj.weight
    bias = model.patch_embed.proj.bias
    patches = [
        (weight * x[None, :, i : i + 2, j : j + 2]).sum((1, 2, 3)) + bias for i in (0, 2) for j in (0, 2)
    ]
    tokens = torch.stack([model.cls_token[0, 0], *patches]) + model.pos_embed[0]
    tokens = torch.cat([tokens[:1], model.register_tokens[0], tokens[1:]])
    (block,) = model.blocks
    q, k, v = block.attn.qkv(block.norm1(tokens)).chunk(3, -1)
    tokens = tokens + block.ls1.gamma * block.attn.proj(torch.softmax(q @ k.T / 2, -1) @ v)
    h = block.mlp.fc1(block.norm2(tokens))
    tokens = tokens + block.ls2.gamma * block.mlp.fc2(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    torch.testing.assert_close(model(picture, normed=False)[0], tokens)
    torch.testing.assert_close(model(picture)[0], model.norm(tokens))


def test_dino_is_that_of_transformers():
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'eg3d-rlhf[sd]'"
    )
    theirs = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            mlp_ratio=2,
            image_size=8,
            patch_size=4,
            num_register_tokens=2,
        )
    ).eval()
    ours = randomised(Dino(SMALL))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs.load_state_dict(transformers_names(ours))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(x), theirs(pixel_values=ours.normalised(x)).last_hidden_state, rtol=1e-5, atol=1e-5
        )


def test_positions_of_other_sizes_are_interpolated():
    model = randomised(Dino(SMALL))
    assert model.tokens(torch.rand(1, 3, 16, 16)).shape == (1, 19, 64) and model.positions(4).shape == (
        1,
        17,
        64,
    )
    assert torch.equal(model.positions(2), model.pos_embed)
    with raising("[1, 3, 16, 16]"):
        model(torch.rand(1, 3, 16, 16))
    larger = randomised(Dino(DinoConfig.of({**vars(SMALL), "shown": 16})))
    assert larger.config.tokens == 19 and larger(torch.rand(1, 3, 16, 16)).shape == (1, 19, 64)


def test_positions_without_registers_are_torch_hubs():
    """Not widened, and by a factor of (G' + 0.1) / G: so in the network's code, and so in weights that were
    trained with it.
    """
    plain = Dino(DinoConfig.of({**vars(SMALL), "num_register_tokens": 0, "image_size": 24}))
    config = DinoConfig.of_state(plain.state_dict(), "x")
    assert (config.antialias, config.offset) == (False, 0.1) and DinoConfig.of_state(
        Dino(SMALL).state_dict(), "x"
    ).antialias
    model = randomised(Dino(config))
    grid = model.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    wanted = (
        torch.nn.functional.interpolate(grid, scale_factor=(4 + 0.1) / 6, mode="bicubic")
        .flatten(2)
        .transpose(1, 2)
    )
    assert torch.equal(model.positions(4)[:, 1:], wanted)
