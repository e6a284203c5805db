"""DINOv2 and DINOv3 by transformers: an independent formula, and names and files in all layouts."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from eg3d_rlhf.models.dino import (
    MEAN,
    STD,
    Dino,
    Dino3,
    DinoConfig,
    from_hub,
    load_dino,
    read_dino3,
    standardised,
)
from tests.models.published_names import published
from tests.rejections import raising

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'eg3d-rlhf[vision]'"
)

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
    state = published(Dino(SMALL).state_dict())
    assert {name: list(tensor.shape) for name, tensor in state.items()} == NAMES
    assert DinoConfig.from_state(state, "x") == SMALL
    assert SMALL.tokens == 7
    with raising("'cls_token'"):
        DinoConfig.from_state({}, "x")
    for changes, name in (
        ({"hidden_act": "relu"}, "'relu'"),
        ({"use_swiglu_ffn": True}, "has gates"),
        ({"image_size": 9}, "image_size=9"),
    ):
        with raising(name):
            DinoConfig.from_settings({**vars(SMALL), **changes})


def test_a_file_of_torch_hub_is_the_same_network():
    model = randomised(Dino(SMALL))
    state = published(model.state_dict())
    again = from_hub(state, SMALL)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(load_dino(SMALL, again, "x")(x), model(x))
    del state["blocks.0.attn.qkv.bias"]
    state["blocks.0.more"] = torch.zeros(1)
    with raising("missing: encoder.layer.0.attention.attention.key.bias", "unexpected: encoder.layer.0.more"):
        load_dino(SMALL, from_hub(state, SMALL), "x")


def test_hidden_widths_are_those_of_the_tensors():
    """The ratio of two widths is rounded, and its product must not come out one smaller."""
    for hidden in (27, 32, 54, 55, 64):
        config = DinoConfig.from_settings({**vars(SMALL), "hidden_size": 49, "mlp_ratio": hidden / 49})
        assert Dino(config).encoder.layer[0].mlp.fc1.out_features == hidden


def test_dino_is_its_formula():
    """One layer with one head, computed step by step; registers follow the class token."""
    model = randomised(
        Dino(
            DinoConfig.from_settings({**vars(SMALL), "hidden_size": 4, "image_size": 4, "patch_size": 2})
        ).double()
    )
    embeddings = model.embeddings
    image = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    x = (image[0] - image.new_tensor(MEAN)[:, None, None]) / image.new_tensor(STD)[:, None, None]
    weight = model.embeddings.patch_embeddings.projection.weight
    bias = model.embeddings.patch_embeddings.projection.bias
    patches = [
        (weight * x[None, :, i : i + 2, j : j + 2]).sum((1, 2, 3)) + bias for i in (0, 2) for j in (0, 2)
    ]
    tokens = torch.stack([embeddings.cls_token[0, 0], *patches]) + embeddings.position_embeddings[0]
    tokens = torch.cat([tokens[:1], embeddings.register_tokens[0], tokens[1:]])
    (block,) = model.encoder.layer
    attention = block.attention.attention
    given = block.norm1(tokens)
    q, k, v = (layer(given) for layer in (attention.query, attention.key, attention.value))
    tokens = tokens + block.layer_scale1.lambda1 * block.attention.output.dense(
        torch.softmax(q @ k.T / 2, -1) @ v
    )
    h = block.mlp.fc1(block.norm2(tokens))
    tokens = tokens + block.layer_scale2.lambda1 * block.mlp.fc2(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    torch.testing.assert_close(model(image, normed=False)[0], tokens)
    torch.testing.assert_close(model(image)[0], model.layernorm(tokens))


def test_the_parts_of_transformers_network_give_what_the_full_model_gives():
    full_model = transformers.Dinov2WithRegistersModel(
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
    model = randomised(Dino(SMALL))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    full_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = full_model(pixel_values=standardised(x, x)).last_hidden_state
    assert torch.equal(model(x), wanted)


def test_images_of_another_size_than_that_of_the_positions():
    with raising("[1, 3, 16, 16]"):
        randomised(Dino(SMALL))(torch.rand(1, 3, 16, 16))
    larger = randomised(Dino(DinoConfig.from_settings({**vars(SMALL), "shown": 16})))
    assert larger.config.tokens == 19 and larger(torch.rand(1, 3, 16, 16)).shape == (1, 19, 64)


def test_positions_without_registers_are_torch_hubs():
    """Interpolation is not antialiased and by a factor of (G' + 0.1) / G, as in the code with which weights
    were
    trained.
    """
    without_registers = DinoConfig.from_settings({**vars(SMALL), "num_register_tokens": 0, "image_size": 24})
    state = published(randomised(Dino(without_registers)).state_dict())
    config = DinoConfig.from_state(state, "x", shown=16)
    assert (config.pixels, config.tokens) == (16, 17)
    grid = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    wanted = (
        torch.nn.functional.interpolate(grid, scale_factor=(4 + 0.1) / 6, mode="bicubic")
        .flatten(2)
        .transpose(1, 2)
    )
    positions = from_hub(state, config)["embeddings.position_embeddings"]
    assert torch.equal(positions[:, 1:], wanted) and torch.equal(positions[:, 0], state["pos_embed"][:, 0])
    same = from_hub(state, DinoConfig.from_state(state, "x"))["embeddings.position_embeddings"]
    assert torch.equal(same, state["pos_embed"])


def test_without_transformers_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with raising("DINOv2", "transformers", "eg3d-rlhf[vision]"):
        Dino(SMALL)


def test_dinov3_keeps_its_frequencies_and_rejects_odd_heads(tmp_path):
    """The frequencies are in no file, and the network is built without memory."""
    content = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    content |= {"model_type": "dinov3_vit", "num_register_tokens": 1}
    model = randomised(Dino3(transformers.DINOv3ViTConfig.from_dict(content)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))
    x = torch.rand(1, 3, 32, 48)
    assert torch.equal(read_dino3(str(tmp_path))(x), model(x)) and model(x).shape == (1, 2 + 6, 32)
    odd = (
        ({"num_attention_heads": 16}, "four"),
        ({"use_gated_mlp": True}, "has gates"),
        ({"hidden_size": "x"}, ""),
    )
    for changes, name in odd:
        (tmp_path / "config.json").write_text(json.dumps(content | changes))
        with raising("config.json", name):
            read_dino3(str(tmp_path))
