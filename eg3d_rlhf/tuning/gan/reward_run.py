"""Build a GAN run from its settings: data, networks, phases, reward, held-out metrics and training loop.

`build` makes a new run, `resume` resumes one, and `train` trains to the end.
"""

import contextlib
import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.cli import choose_device, prefix_errors
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments.image_set_warnings import warn_about_images
from eg3d_rlhf.experiments.run import STATS, Run
from eg3d_rlhf.generators import (
    KEPT,
    Generator,
    as_generator,
    find_network,
    load_generator,
    load_networks,
    set_level,
)
from eg3d_rlhf.generators.density_samples import sample_density
from eg3d_rlhf.rewards import crop_report
from eg3d_rlhf.rewards.observations import OBSERVATIONS
from eg3d_rlhf.rewards.presets import presets_of
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward, untrained_reward
from eg3d_rlhf.rewards.stated_accuracy import RewardUse, announce_reward
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
from training.progress import working
from training.synthetic_heads import resolve_dataset

# Augmentations of --aug=ada, as arguments of `AugmentPipe`: pixel blitting, geometry and colour, which
# StyleGAN2-ADA calls "bgc" (Karras et al. 2020). The factor 1 gives each of them the probability p.
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


def open_dataset(settings: Settings, ranks: Ranks = SINGLE) -> ImageFolderDataset:
    """Open the training images. Synthetic images are rendered first if they are not in the cache.

    Args:
        settings: settings of the run.
        ranks: processes of the run.
    Raises: ValueError naming --data if the images cannot be read or are not RGB.
    """
    # One process per machine renders synthetic images; the other processes wait, and read its cache.
    with ranks.first_per_machine(), prefix_errors("--data"):
        path = resolve_dataset(settings.data.data)
    with prefix_errors("--data"):
        dataset = ImageFolderDataset(
            path,
            use_labels=True,
            xflip=settings.data.mirror,
            random_seed=settings.loop.seed,
            c_dim=25,  # a camera: 16 numbers of cam2world and 9 intrinsics
        )
        if dataset.num_channels != 3:
            raise ValueError(
                f"{path}: expected RGB images with 3 channels, got images with {dataset.num_channels}."
                " Convert the images to RGB."
            )
    return dataset


def open_networks(settings: Settings, resolution: int) -> networks.Networks:
    """Return the networks from which the run starts.

    With --init=scratch these are new networks, else the networks in the file of --init.

    Args:
        settings: settings of the run.
        resolution: edge length of the training images in pixels.
    Raises: ValueError naming --init or --data if the networks cannot be trained on these images.
    """
    if settings.net.init == "scratch":
        G_kwargs, D_kwargs = networks_for(settings.net, resolution, settings.gan)
        # The initial weights depend on the seed only, and not on random numbers that were used before.
        torch.manual_seed(derive_seed(settings.loop.seed, "init"))
        nets = networks.build(G_kwargs, D_kwargs, {"name": settings.data.data, "resolution": resolution})
        G: Any = nets.G
        G.neural_rendering_resolution = settings.gan.nrr_initial
        nets.G_ema.neural_rendering_resolution = G.neural_rendering_resolution
        return nets
    with prefix_errors("--init"):
        path = find_network(None if settings.net.init == "bundled" else settings.net.init)
        nets = load_networks(path, freeze_layers=settings.net.freezed)
    # The setting `start` chooses which weights of the file G starts from. A tuning run averages G over few
    # images, so G_ema soon follows G: if G started from its raw weights, the pretrained average would be
    # lost.
    starts_from_average = settings.net.start == "G_ema"
    G = nets.G = copy.deepcopy(nets.G_ema) if starts_from_average else nets.G
    if G is None or nets.D is None or nets.D_kwargs is None:
        raise ValueError(
            f"--init: training needs a file with the networks G, D and G_ema, but {path} lacks G or D. Name a"
            " snapshot of a training run."
        )
    if G.img_resolution != resolution:
        raise ValueError(
            f"--data: the networks of --init={settings.net.init} make images of {G.img_resolution} pixels per"
            f" edge, but the training images have {resolution}. Resize the training images to"
            f" {G.img_resolution}."
        )
    if settings.reward.level is not None:
        with prefix_errors("--init"):
            set_level(nets, settings.reward.level)
    # The group size of the minibatch statistics is not taken from the file; it is a setting of this run.
    networks.set_mbstd_group(nets, settings.net.mbstd_group)
    return nets


def check_kind(settings: Settings) -> None:
    """Check that the kind of --reward can tune a generator, and has its reward file if it needs one.

    Raises: ValueError naming --reward or --reward-ckpt.
    """
    reward_kind = settings.reward.reward
    if not OBSERVATIONS[reward_kind].differentiable:
        raise ValueError(
            f"--reward={reward_kind}: this reward has no gradient, so it can select samples but not tune a"
            " generator. Use a differentiable reward, e.g. --reward=solid."
        )
    # A kind with presets has a network, whose weights are in a reward file.
    if settings.reward.reward_ckpt is None and presets_of(reward_kind):
        raise ValueError(
            f"--reward-ckpt: --cfg={settings.net.cfg} with --reward={reward_kind} needs a reward file,"
            " because the bundled reward fits the bundled generator of heads only. Train a reward with"
            " tools/train_reward.py, and pass its file as --reward-ckpt."
        )


def open_reward(settings: Settings, generator: Generator, device: torch.device | str) -> Reward:
    """Return the reward that tunes the generator.

    The reward is read from --reward-ckpt. Without that flag it is a reward in closed form, of the kind
    --reward.

    Raises: ValueError naming --reward-ckpt if the file cannot be read.
    """
    if settings.reward.reward_ckpt is None:
        return untrained_reward(settings.reward.reward, generator).to(device)
    with prefix_errors("--reward-ckpt"):
        return load_reward(settings.reward.reward_ckpt, device)


def input_files(settings: Settings) -> dict[str, Path]:
    """Return the paths of the input files of a run, whose hashes are stored: role -> path.

    The roles are init, reward, heldout and reference. A role is missing if the run has no such file.
    """
    file_by_role = {}
    if settings.net.init != "scratch":
        file_by_role["init"] = find_network(None if settings.net.init == "bundled" else settings.net.init)
    if settings.reward.reward != "none":
        reward_files = {
            "reward": settings.reward.reward_ckpt,
            "heldout": settings.reward.heldout_reward,
            "reference": settings.reward.reference,
        }
        file_by_role |= {role: Path(path) for role, path in reward_files.items() if path is not None}
    return file_by_role


@dataclasses.dataclass
class Objects:
    """Objects of a run: the loop, its networks, and the objects that only runs with a reward have."""

    loop: TrainingLoop
    nets: networks.Networks  # networks that the loop trains
    before: torch.nn.Module | None = None  # untuned generator; None without a reward, and on ranks above 0
    reward: Reward | None = None  # reward that tunes the generator; None for GAN training only
    monitor: Monitor | None = None  # held-out metrics; None without a reward, and on ranks above 0
    early_stop: EarlyStop | None = None  # choice of the snapshot that is kept; None without --early-stop


def build(settings: Settings, run: Run, resumes: bool = False) -> Objects:
    """Build the data, networks, phases, reward and training loop of a new run.

    Only rank 0 measures the untuned generator. The other ranks receive weights and states from rank 0 when
    the loop starts.

    Args:
        settings: settings of the run.
        run: the run, with its folder, its ranks and its flags, of which --weak-reward accepts a reward that
            is not above chance.
        resumes: True for a run that resumes, whose reward was accepted when the run began.
    Raises: ValueError naming the flag whose value does not fit the others.
    """
    ranks = run.ranks
    if settings.reward.reward != "none":
        check_kind(settings)
    device = ranks.device if ranks.world > 1 else choose_device(settings.run.device)
    dataset = open_dataset(settings, ranks)
    nets = open_networks(settings, dataset.resolution).to(device)
    with prefix_errors("--data"):
        is_new = settings.net.init == "scratch"
        warn_about_images(
            dataset,
            as_generator(nets.G_ema),
            f"--cfg={settings.net.cfg}" if is_new else f"--init={settings.net.init}",
            settings.run.strict_cameras,
            ranks.is_main,
        )
    check_fit(nets, settings.gan, settings.loop, ranks.world)
    G = nets.G
    D = nets.D
    assert G is not None and D is not None
    augment: Any = None
    if settings.gan.aug != "noaug":
        augment = AugmentPipe(**ADA_AUGMENT).train().requires_grad_(False).to(device)
        # The probability p of adaptive augmentation starts at 0 and is changed during training.
        augment.p.copy_(torch.as_tensor(settings.gan.p if settings.gan.aug == "fixed" else 0.0))
    phases = GanPhases(G, D, settings.gan, augment).phases()  # Gmain, Greg, Dmain, Dreg
    reward = None
    untuned_generator = None
    monitor = None
    early_stop = None
    if settings.reward.reward != "none":
        reward = open_reward(settings, as_generator(nets.G_ema), device)
        if settings.reward.level is None:
            take_level(nets, reward, ranks.is_main)
        with prefix_errors("--heldout-reward"):
            heldout_path = settings.reward.heldout_reward
            heldout_reward = None if heldout_path is None else load_reward(heldout_path, device)
            # Tuning raises the score of the reward itself and of all its members, so they detect nothing.
            if heldout_reward is not None and heldout_reward.shares_network_with(reward):
                raise ValueError(
                    f"{heldout_path} is the reward of --reward-ckpt itself, or shares a network with it, so"
                    " it cannot detect over-optimisation. Name a reward that was trained on other labels, or"
                    " remove --heldout-reward."
                )
        if reward.observation.kind != settings.reward.reward:
            file_reward_kind = reward.observation.kind
            raise ValueError(
                f"--reward={settings.reward.reward}: the file of --reward-ckpt contains a reward of the kind"
                f" {file_reward_kind}. Pass --reward={file_reward_kind}."
            )
        # Only rank 0 checks, so that a warning is printed once.
        for flag, checked_reward in (("--reward-ckpt", reward), ("--heldout-reward", heldout_reward)):
            if checked_reward is not None and ranks.is_main:
                check_reward(checked_reward, as_generator(nets.G_ema), flag)
        # With lambda_r = 0 the reward is only measured. A held-out reward never tunes.
        announce_reward(
            reward,
            "--reward-ckpt",
            RewardUse(
                tunes=settings.reward.terms.lambda_r > 0,
                allows_weak=resumes or bool(run.flags.get("weak_reward")),
                is_main=ranks.is_main,
            ),
        )
        if heldout_reward is not None:
            announce_reward(heldout_reward, "--heldout-reward", RewardUse(is_main=ranks.is_main))
        reference = nets.G_ema
        if settings.reward.reference is not None:
            level = as_generator(nets.G_ema).level
            reference = load_generator(settings.reward.reference, device, level).G
        if ranks.is_main:
            print("Measuring the untuned generator on held-out latents.", flush=True)
            # A copy, because the reference may be G_ema, which changes during tuning.
            untuned_generator = copy.deepcopy(reference).eval().requires_grad_(False)
            with working("measuring the untuned generator"):
                monitor = make_monitor(settings.to_dict(), reward, untuned_generator, heldout_reward)
        # With lambda_r = 0 the phase is left out, so that the run is bitwise identical to GAN training.
        if settings.reward.terms.lambda_r > 0:
            # Appended last: in every iteration the reward phase runs after the adversarial phases.
            with working("scoring the untuned generator") if ranks.is_main else contextlib.nullcontext():
                terms = RewardTerms(G, reference, reward, settings.reward.terms)
            phases.append(reward_phase(terms, lazy_adam(G, settings.reward.rlr)))
            if settings.reward.keeping.early_stop is not None:
                early_stop = EarlyStop(
                    nets,
                    terms.state.G_ref,
                    settings.reward.keeping,
                    settings.reward.terms.consistency_resolution,
                ).to(device)
    workers = default_workers(dataset, ranks) if settings.run.workers is None else settings.run.workers
    gan_training = Gan(
        nets, dataset, settings.gan, settings.loop, augment_pipe=augment, ranks=ranks, workers=workers
    )
    # Checkpoints store this module with the kept snapshot, so that a resumed run can still choose it.
    carried_modules = {} if early_stop is None else {"early_stop": early_stop}
    loop = TrainingLoop(
        gan_training,
        phases,
        settings.loop,
        run,
        options=settings.to_dict(),
        on_tick=make_tick_callback(monitor, early_stop),
        ranks=ranks,
        carries=carried_modules,
    )
    return Objects(loop, nets, untuned_generator, reward, monitor, early_stop)


def take_level(nets: networks.Networks, reward: Reward, prints: bool) -> None:
    """Set the level at which the labelled shapes of a reward were extracted, if its file states one.

    Args:
        nets: networks of the run.
        reward: reward that tunes them.
        prints: True to print a line if the level changes.
    """
    label_level = reward.provenance.get("level")
    if label_level is None or as_generator(nets.G_ema).level == label_level:
        return
    with prefix_errors("--reward-ckpt"):
        set_level(nets, label_level)
    if prints:
        print(f"Surface level: {label_level:g}, the level of the reward's labels.", flush=True)


def print_surfaces(settings: Settings, objects: Objects) -> None:
    """Print the range of the density of eight samples, and how much of their surface the reward reads.

    Nothing is printed for new networks, which have no shapes yet. Random numbers of the run stay the same.

    Args:
        settings: settings of the run.
        objects: networks and reward of the run.
    """
    if settings.net.init == "scratch":
        return
    generator = as_generator(objects.nets.G_ema)
    with prefix_errors("--init"):
        samples = sample_density(generator)
    check = samples.check(generator.level)
    print(f"{check.line()[:1].upper()}{check.line()[1:]}.", flush=True)
    problem = check.problem(
        "The summary has no meshes of such samples. Stop the run, and start it with --set level={level}"
    )
    if problem is not None:
        print(f"Warning: --init: {problem}", file=sys.stderr, flush=True)
    spec = getattr(getattr(objects.reward, "observation", None), "spec", None)
    if isinstance(spec, SlabSpec):
        print(crop_report.summary(crop_report.compute(generator, spec, samples)), flush=True)


def make_tick_callback(monitor: Monitor | None, early_stop: EarlyStop | None):
    """Return the function that the training loop calls at every tick, or None if there is nothing to measure.

    The function measures the held-out metrics, and then calls the early stop, which needs these metrics.
    """
    if monitor is None or early_stop is None:
        return monitor

    def on_tick(loop, stats: dict) -> dict[str, str]:
        monitor_fields = monitor(loop, stats)  # fills `monitor.latest`, which the next line reads
        return {**monitor_fields, **early_stop.tick(loop, stats, monitor.latest[HELDOUT])}

    return on_tick


def resume(settings: Settings, run: Run, checkpoint_path: Path, allows_previous: bool) -> Objects:
    """Build a run and restore its state from a checkpoint.

    Args:
        settings: settings of the run.
        run: the run, with its folder and its ranks.
        checkpoint_path: the run's folder or one of its checkpoints.
        allows_previous: True to read the previous checkpoint if the newest one is damaged, see
            training.checkpoint.read.
    """
    objects = build(settings, run, resumes=True)  # the checkpoint overwrites the weights that are built here
    objects.loop.resume(checkpoint_path, allows_previous)
    if objects.monitor is not None:
        # The alarms and the choices of earlier ticks are in the file of statistics. `loop.resume` has removed
        # from it the ticks after the checkpoint.
        objects.monitor.restore(run.folder / STATS)
        if objects.early_stop is not None:
            objects.early_stop.restore(run.folder / STATS)
    return objects


def train(objects: Objects, run: Run) -> bool:
    """Train to the end, and save the snapshot that the early stop has chosen.

    Returns: True if the training is complete; False if a signal ended it earlier.
    """
    objects.loop.run()
    if objects.loop.stopped is not None:
        return False
    # `EarlyStop.tick` saves the snapshot as well. It is saved again because a run that was resumed from an
    # older checkpoint may have a file that a later tick of the interrupted run wrote.
    if objects.early_stop is not None and run.ranks.is_main:
        networks.save(run.folder / KEPT, objects.early_stop.networks(objects.nets))
    run.ranks.barrier()
    leave()  # ends the process group: rank 0 evaluates next, and the other ranks do not wait for it
    return True
