"""A GAN run composed: data, networks, phases, reward, monitor and loop; nothing is computed here."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.cli import choose_device, naming
from eg3d_rlhf.experiments.run import STATS, Run
from eg3d_rlhf.generators import KEPT, Generator, find_network, load_networks, of
from eg3d_rlhf.rewards.observations import OBSERVATIONS
from eg3d_rlhf.rewards.presets import presets_of
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward, untaught
from eg3d_rlhf.tuning.gan.early_stop import EarlyStop
from eg3d_rlhf.tuning.gan.heldout_metrics import HELDOUT, Monitor, make_monitor
from eg3d_rlhf.tuning.gan.phase import RewardTerms, reward_phase
from eg3d_rlhf.tuning.gan.settings import Settings
from training import networks
from training.augment import AugmentPipe
from training.config import networks_for
from training.dataset import ImageFolderDataset, default_workers
from training.distributed import SINGLE, Ranks, leave
from training.gan import Gan, check_fit
from training.gan_phases import GanPhases
from training.loop import TrainingLoop
from training.phases import derive_seed, lazy_adam
from training.synthetic_heads import resolve_dataset

ADA_AUGMENT = dict.fromkeys(
    (
        "xflip",
        "rotate90",
        "xint",
        "scale",
        "rotate",
        "aniso",
        "xfrac",
        "brightness",
        "contrast",
        "lumaflip",
        "hue",
        "saturation",
    ),
    1,
)


def open_dataset(s: Settings, ranks: Ranks = SINGLE) -> ImageFolderDataset:
    with ranks.first_per_machine(), naming("--data"):
        path = resolve_dataset(s.data.data)
    with naming("--data"):
        dataset = ImageFolderDataset(
            path, use_labels=True, xflip=s.data.mirror, random_seed=s.loop.seed, c_dim=25
        )
        if dataset.num_channels != 3:
            raise ValueError(
                f"{path}: expected RGB images, got {dataset.num_channels} channel. Convert them."
            )
    return dataset


def open_networks(s: Settings, resolution: int) -> networks.Networks:
    """Fresh networks, or those that --init names, for images of `resolution` pixels."""
    if s.net.init == "scratch":
        G_kwargs, D_kwargs = networks_for(s.net, resolution, s.gan)
        torch.manual_seed(derive_seed(s.loop.seed, "init"))
        nets = networks.build(G_kwargs, D_kwargs, {"name": s.data.data, "resolution": resolution})
        G: Any = nets.G
        G.neural_rendering_resolution = s.gan.nrr_initial
        nets.G_ema.neural_rendering_resolution = G.neural_rendering_resolution
        return nets
    with naming("--init"):
        path = find_network(None if s.net.init == "bundled" else s.net.init)
        nets = load_networks(path, freeze_layers=s.net.freezed)
    # with a short moving average the raw G would soon replace the pretrained average
    averaged = s.net.start == "G_ema"
    G = nets.G = copy.deepcopy(nets.G_ema) if averaged else nets.G
    if G is None or nets.D is None or nets.D_kwargs is None:
        raise ValueError(
            f"--init: expected a network file with G, D and G_ema, got {path} with G_ema alone. Use a"
            " snapshot of a run."
        )
    if G.img_resolution != resolution:
        raise ValueError(
            f"--data: expected images of {G.img_resolution} pixels for --init={s.net.init}, got {resolution}."
            " Resize them."
        )
    networks.set_mbstd_group(nets, s.net.mbstd_group)  # D's groups are the run's
    return nets


def check_kind(s: Settings) -> None:
    """Raises: ValueError where --reward has no gradient, and where its networks learn and none is named."""
    kind = s.reward.reward
    flag = "--reward-ckpt"
    if not OBSERVATIONS[kind].differentiable:
        raise ValueError(
            f"--reward={kind}: expected a reward with a gradient, got one that only chooses. Use e.g."
            " --reward=solid."
        )
    if s.reward.reward_ckpt is None and presets_of(kind):
        raise ValueError(
            f"{flag}: expected a reward for --cfg={s.net.cfg} --reward={kind}, got nothing: the bundled one"
            " knows heads alone. Name one, such as tools/train_reward.py writes."
        )


def open_reward(s: Settings, generator: Generator, device: torch.device | str) -> Reward:
    """The reward that --reward-ckpt names, or one that has nothing to learn."""
    if s.reward.reward_ckpt is None:
        return untaught(s.reward.reward, generator).to(device)
    with naming("--reward-ckpt"):
        return load_reward(s.reward.reward_ckpt, device)


def input_files(s: Settings) -> dict[str, Path]:
    """The files that a run starts from, by what they are; runs record and compare their hashes."""
    files = (
        {}
        if s.net.init == "scratch"
        else {"init": find_network(None if s.net.init == "bundled" else s.net.init)}
    )
    if s.reward.reward != "none":
        named = {
            "reward": s.reward.reward_ckpt,
            "heldout": s.reward.heldout_reward,
            "reference": s.reward.reference,
        }
        files |= {name: Path(path) for name, path in named.items() if path is not None}
    return files


@dataclasses.dataclass
class Objects:
    """Everything that a run consists of."""

    loop: TrainingLoop
    nets: networks.Networks  # that it trains
    before: torch.nn.Module | None = None  # with a reward, on the first rank: the untuned generator
    reward: Reward | None = None
    monitor: Monitor | None = None
    early_stop: EarlyStop | None = None  # which of its snapshots is kept


def build(s: Settings, files: Run) -> Objects:
    """Data, networks, phases, reward and loop of the settings; what rank 0 alone computes reaches the others
    when the loop starts.
    """
    ranks = files.ranks
    if s.reward.reward != "none":
        check_kind(s)
    device = ranks.device if ranks.world > 1 else choose_device(s.run.device)
    dataset = open_dataset(s, ranks)
    nets = open_networks(s, dataset.resolution).to(device)
    check_fit(nets, s.gan, s.loop, ranks.world)
    G = nets.G
    D = nets.D
    assert G is not None and D is not None
    augment: Any = None
    if s.gan.aug != "noaug":
        augment = AugmentPipe(**ADA_AUGMENT).train().requires_grad_(False).to(device)
        augment.p.copy_(torch.as_tensor(s.gan.p if s.gan.aug == "fixed" else 0.0))
    phases = GanPhases(G, D, s.gan, augment).phases()
    reward = None
    before = None
    monitor = None
    early = None
    if s.reward.reward != "none":
        reward = open_reward(s, of(nets.G_ema), device)
        with naming("--heldout-reward"):
            second = None if s.reward.heldout_reward is None else load_reward(s.reward.heldout_reward, device)
            if second is not None and second.is_member_of(reward):
                raise ValueError(
                    "expected a reward that does not tune, got a member of --reward-ckpt. Train one on other"
                    " labels."
                )
        if reward.observation.kind != s.reward.reward:
            kind = reward.observation.kind
            raise ValueError(
                f"--reward={s.reward.reward}: expected a reward that reads this, got one of {kind}. Pass"
                f" --reward={kind}."
            )
        for flag, scorer in (("--reward-ckpt", reward), ("--heldout-reward", second)):
            if scorer is not None and ranks.main:
                check_reward(scorer, of(nets.G_ema), flag)
        reference = (
            nets.G_ema if s.reward.reference is None else load_networks(s.reward.reference, device).G_ema
        )
        if ranks.main:
            print("Measuring the untuned generator on held-out latents (a few seconds).", flush=True)
            before = copy.deepcopy(reference).eval().requires_grad_(False)
            monitor = make_monitor(s.to_dict(), reward, before, second)
        if s.reward.terms.lambda_r > 0:
            terms = RewardTerms(G, reference, reward, s.reward.terms)
            phases.append(reward_phase(terms, lazy_adam(G, s.reward.rlr)))
            if s.reward.keeping.early_stop is not None:
                early = EarlyStop(
                    nets, terms.state.G_ref, s.reward.keeping, s.reward.terms.consistency_resolution
                ).to(device)
    workers = default_workers(dataset, ranks) if s.run.workers is None else s.run.workers
    gan = Gan(nets, dataset, s.gan, s.loop, augment_pipe=augment, ranks=ranks, workers=workers)
    carries = {} if early is None else {"early_stop": early}
    loop = TrainingLoop(
        gan,
        phases,
        s.loop,
        files,
        options=s.to_dict(),
        on_tick=observers(monitor, early),
        ranks=ranks,
        carries=carries,
    )
    return Objects(loop, nets, before, reward, monitor, early)


def observers(monitor: Monitor | None, early: EarlyStop | None):
    """What the loop calls at each tick: the monitor, then the early stop, which reads what the monitor
    has measured.
    """
    if monitor is None or early is None:
        return monitor
    return lambda loop, stats: {**monitor(loop, stats), **early.tick(loop, stats, monitor.latest[HELDOUT])}


def go_on(s: Settings, run: Run, source: Path, previous: bool) -> Objects:
    """As `build`, at a state of the run.

    Args: source: the run's folder or one of its states; previous: see training.checkpoint.read.
    """
    objects = build(s, run)  # weights come from the state
    objects.loop.resume(source, previous)
    if objects.monitor is not None:
        objects.monitor.restore(run.folder / STATS)
        if objects.early_stop is not None:
            objects.early_stop.restore(run.folder / STATS)
    return objects


def train(objects: Objects, run: Run) -> bool:
    """Train to the end, and keep the snapshot that an early stop chose. Returns whether that was reached;
    False: a signal ended it.
    """
    objects.loop.run()
    if objects.loop.stopped is not None:
        return False
    if objects.early_stop is not None and run.ranks.main:
        networks.save(run.folder / KEPT, objects.early_stop.networks(objects.nets))
    run.ranks.barrier()
    leave()  # the others need not wait for the evaluation
    return True
