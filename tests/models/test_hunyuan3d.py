"""The networks of Hunyuan3D-2.1 and DINOv2 against oracles of our own, in float64, and the names of their parameters."""

import math

import numpy as np
import pytest
import torch

from eg3d_rlhf.models.hunyuan3d import Attention, Denoiser, DenoiserConfig, Mixture, ShapeDecoder
from eg3d_rlhf.tuning.flow.families import hunyuan3d as family
from tests.tuning.flow.hunyuan3d.tiny_hunyuan3d import CONTENT, LATENTS, C, E, L, write_hunyuan3d

NORMS = [f"norm{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")]
ATTENTION = [f"to_{x}.weight" for x in "qkv"] + ["q_norm.weight", "k_norm.weight", "out_proj.weight", "out_proj.bias"]


def pair(*names):
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


EXPERT = pair("net.0.proj", "net.2")
BLOCK = NORMS + [f"attn{i}.{name}" for i in (1, 2) for name in ATTENTION]
SKIP, MLP = pair("skip_linear", "skip_norm"), pair("mlp.fc1", "mlp.fc2")
MOE = ["moe.gate.weight", *[f"moe.{which}.{n}" for which in ("experts.0", "experts.1", "experts.2", "shared_experts") for n in EXPERT]]
DENOISER = pair("x_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.norm_final", "final_layer.linear") + [
    f"blocks.{i}.{name}" for i in range(5) for name in BLOCK + (SKIP if i > 2 else []) + (MOE if i > 2 else MLP)
]
HEADS = pair("attn.c_proj", "attn.attention.q_norm", "attn.attention.k_norm", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
SELF, CROSS = ["attn.c_qkv.weight", *HEADS], ["attn.c_q.weight", "attn.c_kv.weight", *HEADS, *pair("ln_3")]
DECODER = [
    *pair("post_kl", "geo_decoder.query_proj", "geo_decoder.ln_post", "geo_decoder.output_proj"),
    *(f"transformer.resblocks.{i}.{name}" for i in range(2) for name in SELF),
    *(f"geo_decoder.cross_attn_decoder.{name}" for name in CROSS),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return family.read_files(write_hunyuan3d(tmp_path_factory.mktemp("made") / "ROOT"))


def test_names_are_the_published_ones(found):
    assert set(Denoiser(found.model).state_dict()) == set(DENOISER)
    assert set(ShapeDecoder(found.vae).state_dict()) == set(DECODER)


def test_the_full_size_has_its_mixtures_and_skips_where_they_belong():
    """21 blocks, of which the last six are mixtures and the last ten have skips; 3.05 billion parameters."""
    full = DenoiserConfig(
        input_size=4096, in_channels=64, hidden_size=2048, context_dim=1024, depth=21, num_heads=16, qk_norm=True, text_len=1370,
        use_attention_pooling=False, qkv_bias=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Denoiser(full)
    assert sum(hasattr(block, "moe") for block in model.blocks) == 6 and sum(hasattr(block, "skip_linear") for block in model.blocks) == 10
    assert sum(p.numel() for p in model.parameters()) == 3_050_758_720


def config(**changes) -> DenoiserConfig:
    return DenoiserConfig(**{**CONTENT["model"]["params"], **changes})


def test_attention_deals_projections_to_heads_in_turn():
    """Head h reads columns h 3D ... of to_q, to_k and to_v side by side, in loops."""
    torch.manual_seed(1)
    layer, x = Attention(config(qk_norm=False)).double(), torch.randn(2, 3, 16, dtype=torch.float64)
    rows = torch.cat([x @ getattr(layer, f"to_{n}").weight.T for n in "qkv"], -1)
    heads = []
    for h in range(4):
        q, k, v = (rows[..., 12 * h + 4 * part : 12 * h + 4 * part + 4] for part in range(3))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(4), -1) @ v)
    torch.testing.assert_close(layer(x, x), layer.out_proj(torch.cat(heads, -1)))
    cross, y = Attention(config(qk_norm=False), E).double(), torch.randn(2, L, E, dtype=torch.float64)
    q, rows = x @ cross.to_q.weight.T, torch.cat([y @ cross.to_k.weight.T, y @ cross.to_v.weight.T], -1)
    heads = [
        torch.softmax(q[..., 4 * h : 4 * h + 4] @ rows[..., 8 * h : 8 * h + 4].transpose(1, 2) / 2, -1) @ rows[..., 8 * h + 4 : 8 * h + 8]
        for h in range(4)
    ]
    torch.testing.assert_close(cross(x, y), cross.out_proj(torch.cat(heads, -1)))


def test_a_mixture_is_its_two_likeliest_experts_and_the_shared_one():
    torch.manual_seed(2)
    layer, x = Mixture(config()).double(), torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    want = torch.zeros(2, 3, 16, dtype=torch.float64)
    for n in range(2):
        for s in range(3):
            p = torch.softmax(layer.gate.weight @ x[n, s], 0)
            for number in np.argsort(p.detach().numpy())[-2:]:
                want[n, s] += (p[number] * layer.experts[number](x[n, s])).detach()
            want[n, s] += layer.shared_experts(x[n, s]).detach()
    torch.testing.assert_close(layer(x), want)
    layer(x).square().sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0 and x.grad.isfinite().all()


def test_the_decoder_says_on_a_grid_what_it_says_at_points(found):
    torch.manual_seed(4)
    model, latent = ShapeDecoder(found.vae).eval(), torch.randn(LATENTS, C)
    volume = model.volume(latent, 3)
    point = torch.tensor([[-1.01, 0.0, 1.01]])
    with torch.no_grad():
        assert float(volume[0, 1, 2]) == pytest.approx(float(model.geo_decoder(point[None], model(latent[None]))[0, 0]), abs=1e-5)


def test_the_sampler_is_the_published_one():
    """Points of time 0 to 1, moved by shift; v_null + 5 (v - v_null)."""
    from eg3d_rlhf.tuning.flow.generate import times

    for shift in (1.0, 3.0):
        made, sigma = family.sampling(shift), np.linspace(0, 1, 50)
        np.testing.assert_allclose(1 - np.array(times(made)), shift * sigma / (1 + (shift - 1) * sigma), atol=1e-12)
        assert (1 + made.cfg_strength, made.cfg_interval) == (5.0, (0.0, 1.0))
