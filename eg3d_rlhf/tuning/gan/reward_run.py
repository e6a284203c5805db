"""Composition of a GAN run from data, networks, phases, reward, held-out metrics and loop."""

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

# Augmentations of --aug=ada: pixel blitting, geometry and
# colour, all with probability p ("bgc" of StyleGAN2-ADA).
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
    """Open the training images. Synthetic ones are rendered first if they are not in the cache."""
    # One process per machine renders synthetic images; the others wait for its cache.
    with ranks.first_per_machine(), naming("--data"):
        path = resolve_dataset(s.data.data)
    with naming("--data"):
        dataset = ImageFolderDataset(
            # 25 numbers: EG3D's generators need a camera for every image.
            path,
            use_labels=True,
            xflip=s.data.mirror,
            random_seed=s.loop.seed,
            c_dim=25,
        )
        if dataset.num_channels != 3:
            raise ValueError(
                f"{path}: expected RGB images, got {dataset.num_channels} channel. Convert them to RGB."
            )
    return dataset


def open_networks(s: Settings, resolution: int) -> networks.Networks:
    """Return new networks, or those that --init names, for images of `resolution` pixels."""
    if s.net.init == "scratch":
        G_kwargs, D_kwargs = networks_for(s.net, resolution, s.gan)
        # The weights depend on the seed alone, not on what was drawn before.
        torch.manual_seed(derive_seed(s.loop.seed, "init"))
        nets = networks.build(G_kwargs, D_kwargs, {"name": s.data.data, "resolution": resolution})
        G: Any = nets.G
        G.neural_rendering_resolution = s.gan.nrr_initial
        nets.G_ema.neural_rendering_resolution = G.neural_rendering_resolution
        return nets
    with naming("--init"):
        path = find_network(None if s.net.init == "bundled" else s.net.init)
        nets = load_networks(path, freeze_layers=s.net.freezed)
    # With the short moving average of a tuning run, the raw G would soon replace the pretrained average.
    averaged = s.net.start == "G_ema"  # see --start
    G = nets.G = copy.deepcopy(nets.G_ema) if averaged else nets.G
    if G is None or nets.D is None or nets.D_kwargs is None:
        raise ValueError(
            f"--init: expected a network file with G, D and G_ema, but {path} has G_ema only. Use a snapshot"
            " of a training run."
        )
    if G.img_resolution != resolution:
        raise ValueError(
            f"--data: --init={s.net.init} needs images of {G.img_resolution} pixels, got {resolution}. Resize"
            " the images."
        )
    networks.set_mbstd_group(nets, s.net.mbstd_group)  # the group size is a setting of this run
    return nets


def check_kind(s: Settings) -> None:
    """Check that --reward can tune, and that a reward file is given if this kind needs one.

    Raises: ValueError naming the flag.
    """
    kind = s.reward.reward
    flag = "--reward-ckpt"
    if not OBSERVATIONS[kind].differentiable:
        raise ValueError(
            f"--reward={kind}: this reward has no gradient and can only select samples. Use a differentiable"
            " one, e.g. --reward=solid."
        )
    if s.reward.reward_ckpt is None and presets_of(kind):
        raise ValueError(
            f"{flag}: --cfg={s.net.cfg} --reward={kind} needs a reward file. The bundled reward covers only"
            " the bundled generator of heads. Train one with tools/train_reward.py and name it."
        )


def open_reward(s: Settings, generator: Generator, device: torch.device | str) -> Reward:
    """Return the reward of --reward-ckpt, or one of a kind that has nothing to learn."""
    if s.reward.reward_ckpt is None:
        return untaught(s.reward.reward, generator).to(device)
    with naming("--reward-ckpt"):
        return load_reward(s.reward.reward_ckpt, device)


def input_files(s: Settings) -> dict[str, Path]:
    """Return the files that a run starts from, by role. Runs store and compare their hashes."""
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
    nets: networks.Networks  # networks that the loop trains
    before: torch.nn.Module | None = None  # with a reward, on rank 0: the untuned generator
    reward: Reward | None = None
    monitor: Monitor | None = None  # held-out metrics, on rank 0
    early_stop: EarlyStop | None = None  # choice of the snapshot that is kept


def build(s: Settings, files: Run) -> Objects:
    """Build data, networks, phases, reward and loop from the settings.

    Rank 0 alone measures the untuned generator. Weights and states reach the other ranks when the loop
    starts.
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
        # Adaptive augmentation starts at 0.
        augment.p.copy_(torch.as_tensor(s.gan.p if s.gan.aug == "fixed" else 0.0))
    phases = GanPhases(G, D, s.gan, augment).phases()  # Gmain, Greg, Dmain, Dreg
    reward = None
    before = None
    monitor = None
    early = None
    if s.reward.reward != "none":
        reward = open_reward(s, of(nets.G_ema), device)
        with naming("--heldout-reward"):
            second = None if s.reward.heldout_reward is None else load_reward(s.reward.heldout_reward, device)
            # A member of the tuning ensemble would rise with it and detect nothing.
            if second is not None and second.is_member_of(reward):
                raise ValueError(
                    "this reward is a member of --reward-ckpt, so it cannot detect over-optimisation. Train"
                    " one on other labels."
                )
        if reward.observation.kind != s.reward.reward:
            kind = reward.observation.kind
            raise ValueError(
                f"--reward={s.reward.reward}: --reward-ckpt is a reward of the kind {kind}. Pass"
                f" --reward={kind}."
            )
        # On rank 0 only, which prints warnings.
        for flag, scorer in (("--reward-ckpt", reward), ("--heldout-reward", second)):
            if scorer is not None and ranks.main:
                check_reward(scorer, of(nets.G_ema), flag)
        reference = (
            nets.G_ema if s.reward.reference is None else load_networks(s.reward.reference, device).G_ema
        )
        if ranks.main:
            print("Measuring the untuned generator on held-out latents (a few seconds).", flush=True)
            # A copy, since G_ema changes during tuning.
            before = copy.deepcopy(reference).eval().requires_grad_(False)
            monitor = make_monitor(s.to_dict(), reward, before, second)
        # With lambda_r = 0 there is no reward phase at all: the run is bitwise identical to GAN training.
        if s.reward.terms.lambda_r > 0:
            # Appended: the reward phase runs after the adversarial ones in every iteration.
            terms = RewardTerms(G, reference, reward, s.reward.terms)
            phases.append(reward_phase(terms, lazy_adam(G, s.reward.rlr)))
            if s.reward.keeping.early_stop is not None:
                early = EarlyStop(
                    nets, terms.state.G_ref, s.reward.keeping, s.reward.terms.consistency_resolution
                ).to(device)
    workers = default_workers(dataset, ranks) if s.run.workers is None else s.run.workers
    gan = Gan(nets, dataset, s.gan, s.loop, augment_pipe=augment, ranks=ranks, workers=workers)
    # Checkpoints store the kept snapshot, so that a resumed run can still choose it.
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
    """Return the loop's tick callback: the held-out metrics, then the early stop, which needs them."""
    if monitor is None or early is None:
        return monitor
    # The order matters: `monitor(...)` fills `monitor.latest` before the second entry reads it.
    return lambda loop, stats: {**monitor(loop, stats), **early.tick(loop, stats, monitor.latest[HELDOUT])}


def go_on(s: Settings, run: Run, source: Path, previous: bool) -> Objects:
    """Build a run like `build`, and restore a state of it.

    Args:
        source: the run's folder or one of its checkpoints.
        previous: see training.checkpoint.read.
    """
    objects = build(s, run)  # its weights are overwritten by the checkpoint
    objects.loop.resume(source, previous)
    if objects.monitor is not None:
        # Alarms and choices of earlier ticks are in the statistics
        # file, which the resume has cut to its tick.
        objects.monitor.restore(run.folder / STATS)
        if objects.early_stop is not None:
            objects.early_stop.restore(run.folder / STATS)
    return objects


def train(objects: Objects, run: Run) -> bool:
    """Train to the end, and save the snapshot that the early stop chose.

    Returns False if a signal ended the run before.
    """
    objects.loop.run()
    if objects.loop.stopped is not None:
        return False
    # Saved again, so that the file matches the state after a resume, too.
    if objects.early_stop is not None and run.ranks.main:
        networks.save(run.folder / KEPT, objects.early_stop.networks(objects.nets))
    run.ranks.barrier()
    leave()  # rank 0 evaluates next, and the others need not wait for it
    return True
