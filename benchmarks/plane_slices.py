"""Compare the CPU time of a tuning iteration with and without slices: python -m benchmarks.plane_slices

An iteration has the parts of the demo that depend on the planes: the reward of a slab with its gradient, and
the density-consistency term on a grid of 32 points per axis. Both generators have the weights and the sizes
of the bundled one. Iterations of both alternate, and the ratio is the median over pairs, so that other jobs
on the machine hardly change it.
"""

import copy
import json
import statistics
import sys
import time
from typing import Any

import torch

from eg3d_rlhf import load_reward
from eg3d_rlhf.core.cli import ASSETS
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import as_generator, load_networks
from training.rendering.renderer import slice_blend

BATCH = 4  # latents per iteration, as in the demo
WARM_UP = 2  # pairs that do not count


def generators(plane_slices: int) -> tuple[Any, Any]:
    """Return the bundled generator with the given slices, to be tuned, and its frozen copy."""
    network = load_networks(ASSETS / "generator.safetensors").G_ema
    network.renderer.blend = slice_blend(plane_slices)
    return as_generator(copy.deepcopy(network).requires_grad_(True)), as_generator(network)


def iteration_seconds(generator: Any, reference: Any, reward: Any) -> float:
    """Return the CPU seconds of one iteration, with both backward passes."""
    torch.manual_seed(0)
    start_time = time.process_time()
    c = torch.zeros(BATCH, 25)
    field = generator.field(generator.mapping(torch.randn(BATCH, 64), c))
    reward.network.score(reward.observation.observe(field)).sum().backward()
    z = torch.randn(BATCH, 64)
    cube = SlabSpec.cube(32)
    sigma = generator.field(generator.mapping(z, c)).density_grid(cube)
    with torch.no_grad():
        reference_field = reference.field(reference.mapping(z, c))
        sigma_ref = reference_field.density_grid(cube)
        reward.network.score(reward.observation.observe(reference_field))
    (sigma - sigma_ref).abs().mean().backward()
    return time.process_time() - start_time


def main(pair_count: int) -> None:
    """Print the medians of both and of their ratio as JSON."""
    reward = load_reward(ASSETS / "reward.safetensors")
    pairs = [generators(plane_slices) for plane_slices in (1, 2)]
    seconds = [[iteration_seconds(*pair, reward) for pair in pairs] for _ in range(pair_count + WARM_UP)]
    without_slices, with_slices = zip(*seconds[WARM_UP:], strict=True)
    ratio = statistics.median(b / a for a, b in zip(without_slices, with_slices, strict=True))
    result = {
        "pairs": pair_count,
        "seconds": statistics.median(without_slices),
        "seconds_with_slices": statistics.median(with_slices),
        "ratio": ratio,
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
