"""Memory estimates on fake tensors: sums by hand, and a prior's own methods on stubs of its networks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eg3d_rlhf.core.memory import MemoryTrace
from eg3d_rlhf.models.weights import empty
from eg3d_rlhf.tuning.distill.priors.latent_diffusion import LatentPrior, PriorOptions, latent_costs

B = 3
WIDTH = 64


def test_the_peak_of_a_layer_is_its_output_and_what_its_gradient_holds():
    trace = MemoryTrace()
    layer = trace.fill(empty(lambda: nn.Linear(WIDTH, 4 * WIDTH, bias=False))).requires_grad_(False)
    weights = 4 * WIDTH * 4 * WIDTH
    assert trace.current_bytes == weights

    def forward():
        return layer(torch.empty(B, WIDTH))

    def backward():
        x = torch.empty(B, WIDTH, requires_grad=True)
        out = layer(x)
        return torch.autograd.grad(out, x, torch.empty_like(out))

    x = 4 * B * WIDTH
    assert trace.peak_of(forward) == 5 * x  # input and output
    assert trace.peak_of(backward) == 5 * x + 4 * x + x  # besides, both gradients
    assert trace.current_bytes == weights  # nothing is left


def test_attention_holds_no_matrix_of_tokens_by_tokens():
    trace = MemoryTrace()
    tokens = 4096
    peak = trace.peak_of(
        lambda: nn.functional.scaled_dot_product_attention(*(torch.empty(1, 1, tokens, 16) for _ in range(3)))
    )
    assert 4 * tokens * 4 * 16 <= peak < tokens**2
    assert trace.flops == 2 * 2 * tokens**2 * 16


class Unet(nn.Module):
    """Stub of a U-Net: a convolution, and the conditioning's mean."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(sample_size=8, in_channels=4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.text = nn.Linear(WIDTH, 4)

    def enable_gradient_checkpointing(self):
        """Do nothing."""

    def forward(self, x, t, encoder_hidden_states, class_labels):
        text = self.text(encoder_hidden_states.mean(1))[:, :, None, None]
        return SimpleNamespace(sample=self.conv(x) + text)


class Vae(nn.Module):
    """Stub of an autoencoder of stride 2."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=0.5, block_out_channels=(1, 1))
        self.down = nn.Conv2d(3, 4, 2, 2)
        self.up = nn.ConvTranspose2d(4, 3, 2, 2)

    def encode(self, images):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.down(images)))

    def decode(self, x):
        return SimpleNamespace(sample=self.up(x))


class Text(nn.Module):
    """Stub of a text encoder."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.embedding = nn.Embedding(10, WIDTH)


@pytest.mark.parametrize("half", [False, True])
def test_costs_of_a_prior_follow_the_number_of_images_and_the_precision(half):
    options = PriorOptions(device="meta", half=half)

    def costs(images):
        networks = {name: empty(kind) for name, kind in (("unet", Unet), ("vae", Vae), ("text", Text))}
        prior = LatentPrior(networks, None, torch.empty(1000, device="meta"), "epsilon", options)
        return latent_costs(prior, images)

    four_images = costs(4)
    many = costs(8)
    assert [size / numbers for numbers, size in four_images.weights.values()] == [2 if half else 4, 4, 4]
    assert four_images.weights == many.weights
    for low, high in zip(four_images.stages.values(), many.stages.values(), strict=True):
        assert 1.5 * low < high < 2.5 * low
