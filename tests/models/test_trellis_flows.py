"""Properties of the second flow: independence of samples, recomputation, dtypes, variants, adapters."""

import math

import pytest
import torch

from eg3d_rlhf.models.lora import add_lora
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.sparse import collate
from eg3d_rlhf.models.trellis.blocks import convert_torso
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig
from eg3d_rlhf.models.trellis.sparse_conv import Kernel
from tests.models.test_sparse_conv import R, random_batch
from tests.rejections import raising

SMALL = dict(
    resolution=R,
    in_channels=3,
    out_channels=3,
    model_channels=24,
    cond_channels=5,
    num_blocks=2,
    num_heads=2,
    io_block_channels=(12,),
    qk_rms_norm=True,
)


def model(**changes):
    torch.manual_seed(0)
    return LatentFlow(LatentFlowConfig(**{**SMALL, **changes}))


def inputs(size=2):
    g = torch.Generator().manual_seed(5)
    return (
        random_batch(dtype=torch.float32, size=size),
        torch.rand(size, generator=g),
        torch.randn(size, 4, 5, generator=g),
    )


def test_samples_of_a_batch_do_not_depend_on_each_other():
    flow = model()
    x, t, cond = inputs(3)
    with torch.no_grad():
        together = flow(x, t, cond).samples()
        for i, sample in enumerate(x.samples()):
            alone = flow(collate([sample]), t[i : i + 1], cond[i : i + 1])
            torch.testing.assert_close(alone.feats, together[i].feats, rtol=1e-5, atol=1e-6)


def test_recomputation_is_bitwise_identical():
    results = []
    for recompute in (False, True):
        flow = model(use_checkpoint=recompute)
        x, t, cond = inputs()
        loss = flow(x, t, cond).feats.square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in flow.parameters())])
    for stored, again in zip(*results, strict=True):
        assert torch.equal(stored, again)


def test_recomputation_keeps_less():
    kept = {}
    for recompute in (False, True):
        flow = model(use_checkpoint=recompute, num_blocks=6)
        x, t, cond = inputs()
        flow.requires_grad_(False)
        add_lora(flow, LoraConfig(rank=2), 0)
        flow(x, t, cond)  # what depends on coordinates alone is found
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda v, sizes=sizes: sizes.append(v.numel()) or v, lambda v: v
        ):
            flow(x, t, cond)
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False] / 5


@pytest.mark.parametrize(
    "changes",
    [
        dict(patch_size=1, io_block_channels=None),
        dict(resolution=8, patch_size=4, io_block_channels=[8, 16]),
        dict(num_io_res_blocks=3),
        dict(num_io_res_blocks=1),
        dict(use_skip_connection=False),
        dict(share_mod=True),
        dict(qk_rms_norm_cross=True),
        dict(num_heads=None, num_head_channels=12),
    ],
    ids=lambda c: ",".join(c),
)
def test_variants_compute_and_train_every_parameter(changes):
    flow = model(**changes)
    x, t, cond = inputs()
    out = flow(x, t, cond)
    assert out.coords is x.coords and out.feats.shape == x.feats.shape
    out.feats.square().sum().backward()
    assert [name for name, p in flow.named_parameters() if p.grad is None] == []


def test_half_precision_blocks_between_float32_ends():
    flow = model()
    x, t, cond = inputs()
    with torch.no_grad():
        full = flow(x, t, cond).feats
        convert_torso(
            (flow.input_blocks, flow.blocks, flow.out_blocks), torch.bfloat16, (torch.nn.Linear, Kernel)
        )
        half = flow(x, t, cond).feats
    assert half.dtype == torch.float32 and flow.out_layer.weight.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    assert not torch.equal(half, full)


def test_time_reaches_the_output_as_a_thousandfold():
    flow = model()
    x, _, cond = inputs()
    seen = []
    flow.t_embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    flow(x, torch.tensor([0.001, 0.25]), cond)
    assert seen[0].shape == (2, 256)
    torch.testing.assert_close(seen[0][:, 0], torch.tensor([math.cos(1), math.cos(250)]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(pe_mode="rope"), ("pe_mode", "'ape'", "'rope'")),
        (dict(patch_size=4), ("patch_size=4", "io_block_channels=(12,)")),
        (dict(num_heads=5), ("model_channels", "24 and 5")),
        (dict(resolution=7), ("patch_size", "resolution", "7 and 2")),
        (dict(sparse_conv="dense"), ("auto", "torch", "spconv", "'dense'")),
    ],
)
def test_architectures_that_do_not_fit_are_rejected(changes, names):
    with raising(*names):
        model(**changes)
