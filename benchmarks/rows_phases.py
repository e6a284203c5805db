"""Rows: phases of training, forward and backward, as the loop runs them; and one whole iteration of reward fine-tuning."""

import copy
import functools
import tempfile
from pathlib import Path

import torch

from benchmarks import configurations
from benchmarks.rows import Case, Outcome, Row, Target
from benchmarks.rows_field import FEW_RAYS
from eg3d_rlhf import experiment
from eg3d_rlhf.reward.reward import load_reward
from eg3d_rlhf.rlhf.phase import RewardTerms, reward_phase
from eg3d_rlhf.run.run import Run
from eg3d_rlhf.settings import Settings
from torch_utils.training_stats import Collector
from training.gan import Gan
from training.gan_phases import GanPhases
from training.loop import TrainingLoop
from training.phases import lazy_adam

DEMO = ("--reward=sigma", "--lambda-r=10", "--data=synthetic:heads64@n=64", "--device=cpu")  # `make demo` on a smaller dataset
_BOTH_PATHS_STEP = 1e-3  # Adam's first steps are signs of gradients: rounding turns some, and later phases of the iteration see that


def phase(device: str, tiny: bool, name: str) -> Case:
    """One phase of EG3D's game with batch 1: losses and gradients of all parameters of the network that it trains."""
    nets, gan = configurations.build(tiny, device)
    terms, batch = GanPhases(nets.G, nets.D, gan), configurations.batch(nets.G, device)
    both = (nets.G, nets.D)
    module, losses = (nets.G if name.startswith("g_") else nets.D), getattr(terms, name)
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
    """`TrainingLoop.step` with Gmain, Greg, Dmain, Dreg and Grlhf all due: bundled networks and reward, the batch of `make demo`."""
    s = configurations.settings(*DEMO, *(["--batch=4"] if tiny else []))
    loop = _demo_loop(s, device)
    gan, n = loop.subject, s.loop.batch
    modules = (gan.nets.G, gan.nets.D, gan.nets.G_ema, *(p.state for p in loop.phases if p.state is not None))
    images = torch.rand([n, 3, gan.dataset.resolution, gan.dataset.resolution], generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.stack([torch.from_numpy(gan.dataset.get_label(i)) for i in range(n)])
    gan._fetched = images.to(device), labels.to(device)  # what its data reader would have brought
    loop.step()  # an iteration in the midst of a run: Adam has its moments
    states, optimizers = configurations.state_of(*modules), {id(one.optimizer): one.optimizer for one in loop.phases}.values()
    moments = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]

    def prepare() -> None:
        configurations.restore(modules, states)
        for optimizer, state in zip(optimizers, moments, strict=True):
            optimizer.load_state_dict(state)
        loop.cur_nimg, loop.batch_idx, loop.stats = 0, 0, Collector()

    def run() -> Outcome:
        loop.step()
        return Outcome({name: torch.tensor(values["mean"]) for name, values in loop.stats.flush().items() if "/signs/" not in name})

    return Case(fast=run, prepare=prepare)


def _demo_loop(s: Settings, device: str) -> TrainingLoop:
    """The loop as `experiment.build` makes it, without the watch and the evaluation around it."""
    dataset = experiment.open_dataset(s)
    nets = experiment.open_networks(s, dataset.resolution).to(device)
    phases = GanPhases(nets.G, nets.D, s.gan).phases()
    terms = RewardTerms(nets.G, nets.G_ema, load_reward(s.reward.reward_ckpt, device), s.reward.terms)
    phases.append(reward_phase(terms, lazy_adam(nets.G, s.reward.rlr)))
    files = Run(Path(tempfile.gettempdir()), {})  # `step` writes nothing
    return TrainingLoop(Gan(nets, dataset, s.gan, s.loop), phases, s.loop, files)


def _row(name: str, function: str, seconds: float, target: Target | None = None) -> Row:
    make = functools.partial(phase, name=function)
    seen = FEW_RAYS if function in ("g_main", "d_main") else 1e-4  # D is shown images that differ by as much
    return Row(
        name=name, size="full", make=make, seconds=seconds, target=target, tolerance=1e-4, gradient_tolerance=seen, half_on_cuda=True,
    )


ROWS = [
    _row("Gmain forward + backward", "g_main", 15, Target(at_least=1.4, aim=2)),
    _row("Greg forward + backward", "g_reg", 3),
    _row("Dmain forward + backward", "d_main", 15),
    _row("Dreg forward + backward", "d_reg", 33, Target(at_least=1.3, aim=2)),
    Row(
        name="one RLHF iteration, all phases", size="bundled", make=rlhf_iteration, seconds=12, target=Target(at_least=2, aim=3),
        tolerance=_BOTH_PATHS_STEP,
    ),
]
