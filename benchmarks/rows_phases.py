"""Rows: phases of training, forward and backward, as the loop runs them; one whole iteration of reward
fine-tuning; and attribution.
"""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import configurations
from benchmarks.rows import Case, Outcome, Row, Target
from benchmarks.rows_field import FEW_RAYS
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.attribution.shapley import CoalitionValues, marginals
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import Generator, of
from eg3d_rlhf.preferences.losses import PreferenceLoss
from eg3d_rlhf.rewards.observations import SigmaSlab
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.slab_network import RewardModel
from eg3d_rlhf.rewards.slab_presets import PAPER, PRESETS, RewardArch
from eg3d_rlhf.tuning.gan import reward_run as gan_run
from eg3d_rlhf.tuning.gan.phase import CUTOFF, RewardTerms, density_l1, reward_phase
from eg3d_rlhf.tuning.gan.settings import RewardConfig, clip_range
from torch_utils.training_stats import Collector
from training.gan import Gan
from training.gan_phases import GanPhases
from training.loop import TrainingLoop
from training.phases import lazy_adam

# `make demo` on a smaller dataset
DEMO = ("--reward=sigma", "--lambda-r=10", "--data=synthetic:people64@n=64", "--device=cpu")
# Adam's first steps are signs of gradients: rounding turns some, and later phases of the iteration see that
_BOTH_PATHS_STEP = 1e-3

# On images that round differently a unit of D may fall on the other side of its leaky ReLU's zero. One at 16
# x 16 pixels moved its bias's gradient by 4.7e-3 of the largest; gradients behind it agreed within 5e-7. The
# reference had such a unit against float64, too (1.3e-4).
_ONE_UNIT = 5e-3


def phase(device: str, tiny: bool, name: str) -> Case:
    """One phase of EG3D's game with batch 1: losses and gradients of all parameters of the network that it
    trains.
    """
    nets, gan = configurations.build(tiny, device)
    terms = GanPhases(nets.G, nets.D, gan)
    batch = configurations.batch(nets.G, device)
    both = (nets.G, nets.D)
    module = nets.G if name.startswith("g_") else nets.D
    losses = getattr(terms, name)
    states = configurations.state_of(*both)

    def run() -> Outcome:
        outputs = {}
        module.requires_grad_(True)
        for i, loss in enumerate(losses(batch)):
            loss.value.mean().backward()
            outputs[f"loss {i}"] = loss.value.detach()
        module.requires_grad_(False)
        return Outcome(outputs, {n: p.grad for n, p in module.named_parameters() if p.grad is not None})

    return Case(fast=run, prepare=lambda: configurations.restore(both, states))


def rlhf_iteration(device: str, tiny: bool) -> Case:
    """`TrainingLoop.step` with Gmain, Greg, Dmain, Dreg and Grlhf all due: bundled networks and reward, the
    batch of `make demo`.
    """
    s = configurations.settings(*DEMO, *(["--batch=4"] if tiny else []))
    n = s.loop.batch
    dataset = gan_run.open_dataset(s)
    nets = gan_run.open_networks(s, dataset.resolution).to(device)
    terms = RewardTerms(nets.G, nets.G_ema, load_reward(s.reward.reward_ckpt, device), s.reward.terms)
    phases = [
        *GanPhases(nets.G, nets.D, s.gan).phases(),
        reward_phase(terms, lazy_adam(nets.G, s.reward.rlr)),
    ]
    gan = Gan(nets, dataset, s.gan, s.loop)
    # as tuning/gan/reward_run.py makes it; `step` writes nothing
    loop = TrainingLoop(gan, phases, s.loop, Run(Path(tempfile.gettempdir()), {}))
    modules = (gan.nets.G, gan.nets.D, gan.nets.G_ema, *(p.state for p in loop.phases if p.state is not None))
    images = (
        torch.rand(
            [n, 3, gan.dataset.resolution, gan.dataset.resolution], generator=torch.Generator().manual_seed(1)
        )
        * 2
        - 1
    )
    labels = torch.stack([torch.from_numpy(gan.dataset.get_label(i)) for i in range(n)])
    gan._fetched = images.to(device), labels.to(device)  # what its data reader would have brought
    loop.step()  # an iteration in the midst of a run: Adam has its moments
    states = configurations.state_of(*modules)
    optimizers = {id(phase.optimizer): phase.optimizer for phase in loop.phases}.values()
    moments = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]

    def prepare() -> None:
        configurations.restore(modules, states)
        for optimizer, state in zip(optimizers, moments, strict=True):
            optimizer.load_state_dict(state)
        loop.cur_nimg = 0
        loop.batch_idx = 0
        loop.stats = Collector()

    def run() -> Outcome:
        loop.step()
        return Outcome(
            {
                name: torch.tensor(values["mean"])
                for name, values in loop.stats.flush().items()
                if "/signs/" not in name
            }
        )

    return Case(fast=run, prepare=prepare)


def paper_reward(device: str, tiny: bool) -> tuple[RewardModel, SlabSpec, torch.Tensor]:
    """The published reward network with random weights, frozen, the slab that it reads, and two smooth random
    ones [2, 1, D, H, W].
    """
    torch.manual_seed(0)
    network = (
        RewardModel(RewardArch.from_dict(PRESETS["small-slice"].network) if tiny else PAPER)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    spec = SlabSpec(resolution=64) if tiny else SlabSpec()
    coarse = torch.rand([2, 1, 9, 9, 9], generator=torch.Generator().manual_seed(0)) * 100
    return (
        network,
        spec,
        F.interpolate(coarse, size=spec.shape, mode="trilinear", align_corners=True).to(device),
    )


def reward_network(device: str, tiny: bool) -> Case:
    """Score of one slab and its gradient."""
    network, _, slabs = paper_reward(device, tiny)
    slab = slabs[:1].clone().requires_grad_()

    def run() -> Outcome:
        score = network.score(slab)
        return Outcome({"score": score.detach()}, {"slab": torch.autograd.grad(score.sum(), slab)[0]})

    return Case(fast=run)


def reward_training(device: str, tiny: bool) -> Case:
    """One pair of slabs through the published method's losses: their terms and the gradients of all
    parameters.
    """
    network, _, slabs = paper_reward(device, tiny)
    network.requires_grad_(True).train()
    loss, better, worse = (
        PreferenceLoss(PRESETS["paper"].train["weights"]),
        *torch.tensor([[0], [1]], device=device),
    )

    def run() -> Outcome:
        out = network(slabs, reconstruct=True)
        given = {
            "pair_logits": network.pair_logits,
            "observed": slabs,
            "epoch": 0,
            "generator": torch.Generator(),
        }
        terms = loss(out, better, worse, **given)
        torch.stack(list(terms.values())).sum().backward()
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        return Outcome({n: v.detach() for n, v in terms.items()}, gradients)

    return Case(fast=run, prepare=lambda: network.zero_grad(set_to_none=True))


def published_iteration(device: str, tiny: bool) -> Case:
    """The reward phase as `RewardTerms.losses` has it, with batch 1:
    losses and gradients of G's parameters.
    """
    nets, _ = configurations.build(tiny, device)
    network, spec, _ = paper_reward(device, tiny)
    config = RewardConfig()
    slab = SigmaSlab(spec)
    batch = configurations.batch(nets.G, device)
    nets.G.requires_grad_(True)
    generator = of(nets.G)
    reference = of(nets.G_ema)
    cube = SlabSpec.of(generator.bounds, 16 if tiny else config.consistency_resolution)

    def density(generator: Generator, z: torch.Tensor) -> torch.Tensor:
        ws = generator.mapping(
            z, batch.gen_c, truncation_psi=config.consistency_psi, truncation_cutoff=CUTOFF
        )
        return generator.field(ws).density_grid(cube)

    def run() -> Outcome:
        ws = generator.mapping(
            batch.gen_z, batch.gen_c, truncation_psi=config.truncation_psi, truncation_cutoff=CUTOFF
        )
        score = network.score(slab.observe(generator.field(ws)))
        (-config.lambda_r * score.clamp(*clip_range(config.reward_clip))).mean().backward()
        z = torch.randn_like(batch.gen_z)
        with torch.no_grad():
            before = density(reference, z)
        distance = density_l1(density(generator, z), before)
        (config.lambda_sigma * distance).mean().backward()
        gradients = {n: p.grad for n, p in nets.G.named_parameters() if p.grad is not None}
        return Outcome({"score": score.detach(), "distance": distance.detach()}, gradients)

    return Case(fast=run, prepare=lambda: nets.G.zero_grad(set_to_none=True))


def coalitions(device: str, tiny: bool) -> Case:
    """Marginal contributions along one order of 12 regions: coalitions, which exact Shapley values need
    2^regions times.

    Reference: captum's ShapleyValueSampling with a feature mask along one order of the regions. It masks the
    whole slab for each coalition and calls the reward's own `score`, one slab at a time; before that, captum
    walks through the mask voxel by voxel in Python. Fast: `CoalitionValues` on the same coalitions. Both
    evaluate the original slab and one more for each region, so the ratio is that of one evaluation among the
    4096 that exact values of 12 regions take; captum's own exact ShapleyValues would walk through all 12!
    orders.
    """
    from captum.attr import ShapleyValueSampling

    reward, spec, slabs = paper_reward(device, tiny)
    z, y, x = (
        torch.arange(n, device=device) * parts // n for n, parts in zip(spec.shape, (2, 3, 2), strict=True)
    )
    labels = (z[:, None, None] * 3 + y[:, None]) * 2 + x
    regions = 12
    original, tuned = slabs
    order = np.random.default_rng(0).permutation(regions)

    def reference() -> Outcome:
        method = ShapleyValueSampling(reward.score)
        # the order of the fast path
        method.permutation_generator = lambda features, samples: [order.tolist()]
        with torch.no_grad():
            attributions = method.attribute(
                tuned[None], baselines=original[None], feature_mask=labels[None, None], n_samples=1
            )
        first = torch.tensor(
            [int((labels.flatten() == i).nonzero()[0]) if (labels == i).any() else -1 for i in range(regions)]
        )
        # captum writes a region's value to its voxels
        values = torch.where(first >= 0, attributions.flatten().cpu()[first.clamp_min(0)], 0.0)
        return Outcome({"marginal contributions": values.float()})

    def fast() -> Outcome:
        # slabs that are mixed at once
        values = CoalitionValues(reward.score, original, tuned, labels, regions, 2)
        return Outcome(
            {"marginal contributions": torch.from_numpy(marginals(values, order[None])[0]).float()}
        )

    return Case(fast=fast, reference=reference)


def _row(name: str, function: str, seconds: float, target: Target | None = None) -> Row:
    make = functools.partial(phase, name=function)
    # D is shown images that differ by as much
    seen = {"g_main": FEW_RAYS, "d_main": _ONE_UNIT}.get(function, 1e-4)
    return Row(
        name=name,
        size="full",
        make=make,
        seconds=seconds,
        target=target,
        tolerance=1e-4,
        gradient_tolerance=seen,
        half_on_cuda=True,
    )


_full_row = functools.partial(Row, size="full", gradient_tolerance=1e-3)
ROWS = [
    _row("Gmain forward + backward", "g_main", 20, Target(at_least=2.6, aim=3)),
    _row("Greg forward + backward", "g_reg", 3),
    _row("Dmain forward + backward", "d_main", 15, Target(at_least=2.1, aim=2.5)),
    _row("Dreg forward + backward", "d_reg", 10, Target(at_least=2, aim=2.5)),
    Row(
        name="one RLHF iteration, all phases",
        size="bundled",
        make=rlhf_iteration,
        seconds=12,
        target=Target(at_least=2.5, aim=3),
        tolerance=_BOTH_PATHS_STEP,
    ),
    _full_row(
        name="reward network, forward + backward to the slab",
        make=reward_network,
        seconds=6,
        target=Target(at_least=2, aim=3),
        tolerance=1e-4,
    ),
    _full_row(
        name="reward training, one pair, forward + backward",
        make=reward_training,
        seconds=30,
        target=Target(at_least=3, aim=4),
        tolerance=1e-4,
    ),
    _full_row(
        name="one RLHF iteration of the published method",
        make=published_iteration,
        seconds=20,
        target=Target(at_least=4.5, aim=6),
        tolerance=1e-3,
    ),
    Row(
        name="Shapley coalitions of 12 regions, full-size reward",
        size="full",
        make=coalitions,
        seconds=35,
        meter_in_round=True,
        target=Target(at_least=4, aim=5),
        tolerance=1e-4,
    ),
]
