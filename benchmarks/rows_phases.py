"""Rows of the benchmark that measure phases of training, iterations of reward tuning, and attribution."""

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
from eg3d_rlhf.generators import Generator, as_generator
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

# flags of `make demo`, with a smaller dataset
DEMO = ("--reward=sigma", "--lambda-r=10", "--data=synthetic:people64@n=64", "--device=cpu")
# Tolerance of an iteration with optimiser steps. Adam's first steps are nearly the signs of the gradients, so
# rounding can invert them where a gradient is almost 0, which changes the results of later phases.
_TOLERANCE_AFTER_STEP = 1e-3

# Tolerance of D's gradients. The images of both paths are rounded differently, so that a unit of D may be on
# the other side of the zero of its leaky ReLU. Such a unit at 16 x 16 pixels once changed the gradient of its
# bias by 4.7e-3 of the largest gradient, while the gradients of later layers agreed within 5e-7. The
# reference has such a unit as well, compared with float64 (1.3e-4).
_UNIT_AT_ZERO_TOLERANCE = 5e-3


def training_phase(device: str, tiny: bool, method_name: str) -> Case:
    """Make the case of a phase of EG3D's training with batch 1.

    Compared are the losses and the gradients of all parameters of the network that the phase trains.
    Args: method_name: name of the method of `GanPhases`.
    """
    nets, gan = configurations.build(tiny, device)
    gan_phases = GanPhases(nets.G, nets.D, gan)
    training_batch = configurations.make_batch(nets.G, device)
    # A phase changes the state of both networks, for example their gradients, which `prepare` restores.
    networks = (nets.G, nets.D)
    trained_network = nets.G if method_name.startswith("g_") else nets.D
    compute_losses = getattr(gan_phases, method_name)
    initial_states = configurations.copy_states(*networks)

    def run() -> Outcome:
        loss_values = {}
        # As in the training loop, only the network that the phase trains needs gradients.
        trained_network.requires_grad_(True)
        # A phase may have several losses, whose gradients are added.
        for loss_index, loss in enumerate(compute_losses(training_batch)):
            loss.value.mean().backward()
            loss_values[f"loss {loss_index}"] = loss.value.detach()
        trained_network.requires_grad_(False)
        return Outcome(
            loss_values,
            {
                parameter_name: parameter.grad
                for parameter_name, parameter in trained_network.named_parameters()
                if parameter.grad is not None
            },
        )

    return Case(fast=run, prepare=lambda: configurations.restore_states(networks, initial_states))


def rlhf_iteration(device: str, tiny: bool) -> Case:
    """Make the case of an iteration of reward tuning, `TrainingLoop.step`, in which all phases run.

    The phases are Gmain, Greg, Dmain, Dreg and the reward's. Networks and reward are the bundled ones; the
    batch is that of `make demo`.
    """
    run_settings = configurations.resolve_settings(*DEMO, *(["--batch=4"] if tiny else []))
    batch_size = run_settings.loop.batch
    dataset = gan_run.open_dataset(run_settings)
    nets = gan_run.open_networks(run_settings, dataset.resolution).to(device)
    reward_terms = RewardTerms(
        nets.G, nets.G_ema, load_reward(run_settings.reward.reward_ckpt, device), run_settings.reward.terms
    )
    phases = [
        *GanPhases(nets.G, nets.D, run_settings.gan).phases(),
        reward_phase(reward_terms, lazy_adam(nets.G, run_settings.reward.rlr)),
    ]
    gan = Gan(nets, dataset, run_settings.gan, run_settings.loop)
    # made as in tuning/gan/reward_run.py; the folder is not used, since `step` writes nothing
    loop = TrainingLoop(gan, phases, run_settings.loop, Run(Path(tempfile.gettempdir()), {}))
    stateful_modules = (
        gan.nets.G,
        gan.nets.D,
        gan.nets.G_ema,
        *(phase.state for phase in loop.phases if phase.state is not None),
    )
    images = (
        torch.rand(
            [batch_size, 3, gan.dataset.resolution, gan.dataset.resolution],
            generator=torch.Generator().manual_seed(1),
        )
        * 2
        - 1
    )
    labels = torch.stack(
        [torch.from_numpy(gan.dataset.get_label(image_index)) for image_index in range(batch_size)]
    )
    gan._fetched = images.to(device), labels.to(device)  # in place of a batch that the data reader has read
    loop.step()  # one iteration, so that Adam has moments, as later in a run
    initial_states = configurations.copy_states(*stateful_modules)
    optimizers = {id(phase.optimizer): phase.optimizer for phase in loop.phases}.values()
    # Adam's moments before the timed iteration
    optimizer_states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]

    def prepare() -> None:
        configurations.restore_states(stateful_modules, initial_states)
        for optimizer, optimizer_state in zip(optimizers, optimizer_states, strict=True):
            optimizer.load_state_dict(optimizer_state)
        loop.cur_nimg = 0
        loop.batch_idx = 0
        loop.stats = Collector()

    def run() -> Outcome:
        loop.step()
        return Outcome(
            {
                stat_name: torch.tensor(stat_values["mean"])
                for stat_name, stat_values in loop.stats.flush().items()
                if "/signs/" not in stat_name
            }
        )

    return Case(fast=run, prepare=prepare)


def paper_reward(device: str, tiny: bool) -> tuple[RewardModel, SlabSpec, torch.Tensor]:
    """Return the published reward network with frozen random weights, the grid of its slabs, and two slabs.

    The slabs are smooth random values, [2, 1, D, H, W].
    """
    torch.manual_seed(0)
    network = (
        RewardModel(RewardArch.from_dict(PRESETS["small-slice"].network) if tiny else PAPER)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    spec = SlabSpec(resolution=64) if tiny else SlabSpec()
    # The slabs are smooth, since they are interpolated from 9^3 random values.
    coarse_slabs = torch.rand([2, 1, 9, 9, 9], generator=torch.Generator().manual_seed(0)) * 100
    return (
        network,
        spec,
        F.interpolate(coarse_slabs, size=spec.shape, mode="trilinear", align_corners=True).to(device),
    )


def reward_network(device: str, tiny: bool) -> Case:
    """Make the case of the reward network: the score of a slab, and its gradient with respect to the slab."""
    network, _, slabs = paper_reward(device, tiny)
    slab = slabs[:1].clone().requires_grad_()

    def run() -> Outcome:
        score = network.score(slab)
        return Outcome({"score": score.detach()}, {"slab": torch.autograd.grad(score.sum(), slab)[0]})

    return Case(fast=run)


def reward_training(device: str, tiny: bool) -> Case:
    """Make the case of a training step of the reward on a pair of slabs, with the published losses.

    Compared are the terms of the loss and the gradients of all parameters.
    """
    network, _, slabs = paper_reward(device, tiny)
    network.requires_grad_(True).train()
    # The pair consists of the slabs 0 (preferred) and 1 (rejected).
    preference_loss, preferred_index, rejected_index = (
        PreferenceLoss(PRESETS["paper"].train["weights"]),
        *torch.tensor([[0], [1]], device=device),
    )

    def run() -> Outcome:
        network_output = network(slabs, reconstruct=True)
        loss_inputs = {
            "pair_logits": network.pair_logits,
            "network_input": slabs,
            "epoch": 0,
            "generator": torch.Generator(),
        }
        loss_terms = preference_loss(network_output, preferred_index, rejected_index, **loss_inputs)
        torch.stack(list(loss_terms.values())).sum().backward()
        gradients = {
            name: parameter.grad
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }
        return Outcome({name: term.detach() for name, term in loss_terms.items()}, gradients)

    return Case(fast=run, prepare=lambda: network.zero_grad(set_to_none=True))


def published_iteration(device: str, tiny: bool) -> Case:
    """Make the case of the reward phase of the published method with batch 1, see `RewardTerms.losses`.

    Compared are the score, the density-consistency distance, and the gradients of G's parameters.
    """
    nets, _ = configurations.build(tiny, device)
    network, spec, _ = paper_reward(device, tiny)
    reward_config = RewardConfig()
    slab_observation = SigmaSlab(spec)
    batch = configurations.make_batch(nets.G, device)
    nets.G.requires_grad_(True)
    generator = as_generator(nets.G)
    reference_generator = as_generator(nets.G_ema)  # in place of the frozen generator before tuning
    cube = SlabSpec.from_bounds(generator.bounds, 16 if tiny else reward_config.consistency_resolution)

    def compute_density(generator: Generator, z: torch.Tensor) -> torch.Tensor:
        ws = generator.mapping(
            z, batch.gen_c, truncation_psi=reward_config.consistency_psi, truncation_cutoff=CUTOFF
        )
        return generator.field(ws).density_grid(cube)

    def run() -> Outcome:
        ws = generator.mapping(
            batch.gen_z, batch.gen_c, truncation_psi=reward_config.truncation_psi, truncation_cutoff=CUTOFF
        )
        score = network.score(slab_observation.observe(generator.field(ws)))
        (-reward_config.lambda_r * score.clamp(*clip_range(reward_config.reward_clip))).mean().backward()
        z = torch.randn_like(batch.gen_z)  # latents of the density-consistency term
        with torch.no_grad():
            reference_density = compute_density(reference_generator, z)
        distance = density_l1(compute_density(generator, z), reference_density)
        (reward_config.lambda_sigma * distance).mean().backward()
        gradients = {
            name: parameter.grad
            for name, parameter in nets.G.named_parameters()
            if parameter.grad is not None
        }
        return Outcome({"score": score.detach(), "distance": distance.detach()}, gradients)

    return Case(fast=run, prepare=lambda: nets.G.zero_grad(set_to_none=True))


def coalitions(device: str, tiny: bool) -> Case:
    """Make the case of the marginal contributions of 12 regions along one order.

    The reference is captum's ShapleyValueSampling with a feature mask and one order of the regions. It first
    reads the mask voxel by voxel in Python. Then it composes the slab of each coalition with the mask, and
    scores one slab at a time. The fast path is `CoalitionValues` with the same coalitions. Both paths
    evaluate the original slab, and one slab for each region. Exact Shapley values of 12 regions need 2^12 =
    4096 such evaluations; captum's exact ShapleyValues would use all 12! orders.
    """
    from captum.attr import ShapleyValueSampling

    reward_model, spec, slabs = paper_reward(device, tiny)
    z, y, x = (
        torch.arange(axis_points, device=device) * part_count // axis_points
        for axis_points, part_count in zip(spec.shape, (2, 3, 2), strict=True)
    )
    region_labels = (z[:, None, None] * 3 + y[:, None]) * 2 + x
    region_count = 12
    original_slab, tuned_slab = slabs
    region_order = np.random.default_rng(0).permutation(region_count)  # the order in which the regions join

    def reference() -> Outcome:
        shapley_sampling = ShapleyValueSampling(reward_model.score)
        # captum uses the same order as the fast path
        shapley_sampling.permutation_generator = lambda features, samples: [region_order.tolist()]
        with torch.no_grad():
            attributions = shapley_sampling.attribute(
                tuned_slab[None],
                baselines=original_slab[None],
                feature_mask=region_labels[None, None],
                n_samples=1,
            )
        first_voxels = torch.tensor(
            [
                int((region_labels.flatten() == region).nonzero()[0])
                if (region_labels == region).any()
                else -1
                for region in range(region_count)
            ]
        )
        # captum assigns the value of a region to each of its voxels, so the first voxel is read
        region_values = torch.where(
            first_voxels >= 0, attributions.flatten().cpu()[first_voxels.clamp_min(0)], 0.0
        )
        return Outcome({"marginal contributions": region_values.float()})

    def fast() -> Outcome:
        # 2: slabs in a batch
        coalition_values = CoalitionValues(
            reward_model.score, original_slab, tuned_slab, region_labels, region_count, 2
        )
        return Outcome(
            {
                "marginal contributions": torch.from_numpy(
                    marginals(coalition_values, region_order[None])[0]
                ).float()
            }
        )

    return Case(fast=fast, reference=reference)


def _row(name: str, phase_name: str, seconds: float, target: Target | None = None) -> Row:
    """Return the row of a training phase. Args: function: name of the method of `GanPhases`."""
    make_case = functools.partial(training_phase, method_name=phase_name)
    # larger tolerances where the images of both paths differ, see the comments of these constants
    gradient_tolerance = {"g_main": FEW_RAYS, "d_main": _UNIT_AT_ZERO_TOLERANCE}.get(phase_name, 1e-4)
    return Row(
        name=name,
        size="full",
        make=make_case,
        seconds=seconds,
        target=target,
        tolerance=1e-4,
        gradient_tolerance=gradient_tolerance,
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
        tolerance=_TOLERANCE_AFTER_STEP,
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
