"""From the flags of train.py to a finished run: settings, objects, loop, summary."""

import copy
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from eg3d_rlhf import bundled, run_folder
from eg3d_rlhf.cli import choose_device, file_hash, naming, versions
from eg3d_rlhf.generators import find_network, load_networks
from eg3d_rlhf.reward.files import load_reward
from eg3d_rlhf.rlhf.evaluate import Evaluation, finish
from eg3d_rlhf.rlhf.measures import make_watch
from eg3d_rlhf.rlhf.phase import RewardConfig, RewardTerms, reward_phase
from training import checkpoint, networks, storage
from training.augment import AugmentPipe
from training.config import LoopConfig, OptimizerConfig, networks_for
from training.dataset import ImageFolderDataset
from training.distributed import SINGLE, Ranks, launch_identity, leave
from training.gan_phases import GanConfig, GanPhases
from training.loop import TrainingLoop, derive_seed, gan_phases, lazy_adam
from training.run_lock import RunLock
from training.synthetic_heads import resolve_dataset
from training.warm_start import fit_sphere

# What flags left at None become: (published presets, heads64 from scratch, heads64 from existing networks).
DEFAULTS = {
    "cbase": (32768, 2048, 2048), "cmax": (512, 64, 64), "plane_layout": ("eg3d", "fixed", "fixed"), "gamma": (None, 0.2, 0.3),
    "gen_pose_cond": (False, False, False), "gpc_reg_fade_kimg": (1000, 5, 0), "blur_fade_kimg": (200, 1, 0), "nrr_initial": (64, 32, 32),
    "kimg": (25000, 18.0, 0.24), "batch": (None, 4, 8), "glr": (0.0025, 0.0025, 2e-5), "dlr": (0.002, 0.002, 1e-4),
    "rlr": (None, None, 2e-4), "start": ("G", "G", "G_ema"),
    "tick": (4, 0.5, 0.06), "snap": (50, 4, 0), "ema_kimg": (None, 1.0, 0.1), "lambda_sigma": (0.01, 0.01, 0.01),
    "anchor_resolution": (64, 32, 32), "sphere_init": (0.0, 0.25, 0.0),
}
ADA_AUGMENT = dict.fromkeys(
    ("xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac", "brightness", "contrast", "lumaflip", "hue", "saturation"), 1
)


def resolve(flags: dict) -> dict:
    """Fill in defaults and check: the JSON-able settings from which everything is built.

    Raises: ValueError, one line per mistake, naming the flag.
    """
    s = {k: (str(v) if isinstance(v, Path) else v) for k, v in flags.items()}
    for name in ("resume", "resume_previous", "dry_run", "outdir", "timeout"):
        s.pop(name, None)
    small = s["cfg"] == "heads64"
    if s["data"] is None:
        if not small:
            raise ValueError(f"--data: expected a dataset for --cfg={s['cfg']}, got nothing. Name a zip or folder in EG3D's format.")
        s["data"] = "synthetic:heads64"
    s["init"] = s["init"] or ("bundled" if small else "scratch")
    column = 0 if not small else (1 if s["init"] == "scratch" else 2)
    s["anchor_resolution"] = None
    for name, row in DEFAULTS.items():
        if s.get(name) is None:
            s[name] = row[column]
    for name in ("gamma", "batch"):
        if s[name] is None:
            raise ValueError(f"--{name}: expected a value for --cfg={s['cfg']}, got nothing. Published runs used --gamma=1 --batch=32.")
    if s["ema_kimg"] is None:
        s["ema_kimg"] = s["batch"] * 10 / 32
    if not small:
        s["blur_fade_kimg"] *= s["batch"] / 32  # as EG3D scales its flag
    if not s["cond"]:
        raise ValueError("--cond: expected True, got False. Cameras come from the labels; a run without them is not possible.")
    if s["reward"] == "sigma":
        s["reward_ckpt"] = s["reward_ckpt"] or str(bundled.REWARD)
        if s["reward_watch"] is None and s["reward_ckpt"] == str(bundled.REWARD):
            s["reward_watch"] = str(bundled.WATCH)
        if s["init"] == "scratch":
            raise ValueError("--reward=sigma: expected pretrained networks, got --init=scratch. Name a network file or use --init=bundled.")
    s["rlr"] = s["rlr"] or s["glr"]
    if s["batch_gpu"] is not None and s["batch"] % s["batch_gpu"]:
        raise ValueError(f"--batch-gpu: expected a divisor of --batch={s['batch']}, got {s['batch_gpu']}. Choose one that divides it.")
    if s["control"] is not None and not Path(s["control"]).exists():
        raise ValueError(f"--control: expected a run folder or its summary.json, got nothing at {s['control']}. Check the path.")
    gan_config(s), loop_config(s), reward_config(s)  # validate
    return s


def gan_config(s: dict) -> GanConfig:
    """GAN loss settings."""
    return GanConfig(
        r1_gamma=s["gamma"], style_mixing_prob=s["style_mixing_prob"], blur_fade_kimg=s["blur_fade_kimg"],
        gpc_reg_prob=s["gpc_reg_prob"] if s["gen_pose_cond"] else None, gpc_reg_fade_kimg=s["gpc_reg_fade_kimg"],
        neural_rendering_resolution_initial=s["nrr_initial"], neural_rendering_resolution_final=s["nrr_final"],
        neural_rendering_resolution_fade_kimg=s["nrr_fade_kimg"], density_reg=s["density_reg"],
        density_reg_p_dist=s["density_reg_p_dist"], reg_type=s["reg_type"], amp=s["amp"] == "bf16",
    )


def loop_config(s: dict) -> LoopConfig:
    """Loop settings."""
    return LoopConfig(
        batch=s["batch"], batch_gpu=s["batch_gpu"], total_kimg=s["kimg"], kimg_per_tick=s["tick"], snapshot_ticks=s["snap"],
        checkpoint_ticks=s["checkpoint_ticks"], ema_kimg=s["ema_kimg"], ema_rampup=0.05 if s["init"] == "scratch" else None,
        g_reg_interval=s["density_reg_every"], ada_target=s["target"] if s["aug"] == "ada" else None,
        ada_kimg=500 if s["init"] == "scratch" else 100, augment_p=s["p"] if s["aug"] == "fixed" else 0.0, seed=s["seed"],
    )


def reward_config(s: dict) -> RewardConfig:
    """Reward phase settings."""
    return RewardConfig(
        lambda_r=s["lambda_r"], lambda_sigma=s["lambda_sigma"], lambda_front=s["lambda_front"], clip=s["reward_clip"],
        shaping=s["reward_shaping"], anchor_resolution=s["anchor_resolution"],
    )


def run_name(s: dict) -> str:
    """EG3D's naming: cfg-dataset-batchB-gammaX, with the reward's weight and --desc."""
    dataset = Path(s["data"].replace(":", "-").split("@")[0]).stem
    name = f"{s['cfg']}-{dataset}-batch{s['batch']}-gamma{s['gamma']:g}"
    if s["reward"] == "sigma":
        name += f"-sigma-lambda{s['lambda_r']:g}"
    return name + (f"-{s['desc']}" if s["desc"] else "")


def open_dataset(s: dict, ranks: Ranks = SINGLE) -> ImageFolderDataset:
    """The training images; a synthetic set is rendered first."""
    with ranks.first_per_machine(), naming("--data"):
        path = resolve_dataset(s["data"])
    with naming("--data"):
        dataset = ImageFolderDataset(path, use_labels=True, xflip=s["mirror"], random_seed=s["seed"], c_dim=25)
        if dataset.num_channels != 3:
            raise ValueError(f"{path}: expected RGB images, got {dataset.num_channels} channel. Convert them.")
    return dataset


def open_networks(s: dict, dataset: ImageFolderDataset, warm_start: bool = True) -> networks.Networks:
    """Fresh networks, or those that --init names; `warm_start` fits fresh ones to the sphere where the settings say so."""
    if warm_start:
        warn_ignored(s)
    if s["init"] != "scratch":
        with naming("--init"):
            path = find_network(None if s["init"] == "bundled" else s["init"])
            nets = load_networks(path, freeze_layers=s["freezed"])
        if nets.G is None or nets.D is None:
            raise ValueError(f"--init: expected a network file with G, D and G_ema, got {path} with G_ema alone. Use a snapshot of a run.")
        if nets.G.img_resolution != dataset.resolution:
            raise ValueError(
                f"--data: expected images of {nets.G.img_resolution} pixels for --init={s['init']}, got {dataset.resolution}. "
                "Resize the data."
            )
        if s["start"] == "G_ema":  # with a short moving average the raw G would soon replace the pretrained average
            nets.G.load_state_dict(nets.G_ema.state_dict())
        return nets
    keys = (
        "cbase", "cmax", "map_depth", "mbstd_group", "freezed", "sr_module", "sr_num_fp16_res", "g_num_fp16_res", "d_num_fp16_res",
        "c_scale", "disc_c_noise", "sr_noise_mode", "decoder_lr_mul", "plane_layout",
    )
    G_kwargs, D_kwargs = networks_for(s["cfg"], dataset.resolution, gan_config(s), **{k: s[k] for k in keys})
    torch.manual_seed(derive_seed(s["seed"], "init"))
    nets = networks.build(G_kwargs, D_kwargs, {"name": s["data"], "resolution": dataset.resolution})
    if s["sphere_init"] > 0 and warm_start:
        fit_sphere(nets.G, s["sphere_init"], seed=derive_seed(s["seed"], "sphere"))
        nets.G_ema.load_state_dict(nets.G.state_dict())
    nets.G.neural_rendering_resolution = nets.G_ema.neural_rendering_resolution = s["nrr_initial"]
    return nets


ARCHITECTURE = {  # flags that only fresh networks can follow, with their defaults
    "map_depth": 2, "mbstd_group": 4, "sr_module": None, "sr_num_fp16_res": 4, "g_num_fp16_res": 0, "d_num_fp16_res": 4, "c_scale": 1.0,
    "disc_c_noise": 0.0, "sr_noise_mode": "none", "decoder_lr_mul": 1.0,
}


def warn_ignored(s: dict) -> None:
    """Say on stderr which flags existing networks do not follow."""
    given = [name for name, default in ARCHITECTURE.items() if s[name] != default]
    given += [name for name in ("cbase", "cmax", "plane_layout") if s[name] != DEFAULTS[name][0 if s["cfg"] != "heads64" else 2]]
    if given and s["init"] != "scratch":
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        print(f"Warning: {flags} ignored: the networks of --init={s['init']} keep their own architecture.", file=sys.stderr)


def check_fit(s: dict, nets: networks.Networks, world: int = 1) -> None:
    """Settings that only the networks and the number of processes can judge.

    Raises: ValueError naming the flag.
    """
    if s["batch"] % (world * (s["batch_gpu"] or 1)):
        raise ValueError(
            f"--batch: expected a multiple of {world} processes x --batch-gpu={s['batch_gpu'] or 1}, got {s['batch']}. Change one of them."
        )
    size, std = s["batch_gpu"] or s["batch"] // world, nets.D.b4.mbstd
    group = min(std.group_size or size, size) if std is not None else 1
    if size % group:
        flag = "--batch-gpu" if s["batch_gpu"] else "--batch"
        raise ValueError(f"{flag}: expected a multiple of D's minibatch-std group of {group}, got {size}. Change it or --mbstd-group.")
    conditioned = not nets.G.rendering_kwargs["c_gen_conditioning_zero"]
    if conditioned != s["gen_pose_cond"]:
        kind = "conditioned on the camera" if conditioned else "that ignores the camera"
        raise ValueError(f"--gen-pose-cond: expected {conditioned} for a generator {kind}, got {s['gen_pose_cond']}. Change the flag.")
    rendered, module = max(s["nrr_initial"], s["nrr_final"] or 0), nets.G.superresolution
    if module.only_enlarges and rendered > module.input_resolution:
        raise ValueError(
            f"--nrr-initial, --nrr-final: expected at most {module.input_resolution} pixels for {type(module).__name__}, got {rendered}. "
            "Lower them."
        )


@dataclasses.dataclass
class Objects:
    """Everything that a run consists of."""

    loop: TrainingLoop
    evaluation: Evaluation | None  # before/after comparison of a reward run


def build(s: dict, run_dir: Path, ranks: Ranks = SINGLE, warm_start: bool = True) -> Objects:
    """Data, networks, phases, reward and loop of the settings; what rank 0 alone computes reaches the others when the loop starts."""
    device = ranks.device if ranks.world > 1 else choose_device(s["device"])
    dataset = open_dataset(s, ranks)
    nets = open_networks(s, dataset, warm_start and ranks.main).to(device)
    check_fit(s, nets, ranks.world)
    augment = None
    if s["aug"] != "noaug":
        augment = AugmentPipe(**ADA_AUGMENT).train().requires_grad_(False).to(device)
        augment.p.copy_(torch.as_tensor(loop_config(s).augment_p))
    config = loop_config(s)
    terms = GanPhases(nets.G, nets.D, gan_config(s), augment)
    phases = gan_phases(terms, OptimizerConfig(lr=s["glr"]), OptimizerConfig(lr=s["dlr"]), config)
    watch = evaluation = None
    if s["reward"] == "sigma":
        with naming("--reward-ckpt"):
            reward, spec, _ = load_reward(s["reward_ckpt"], device)
        with naming("--reward-watch"):
            second = None if s["reward_watch"] is None else load_reward(s["reward_watch"], device)
        if ranks.main:
            print("Measuring the untuned generator on held-out latents (a few seconds).", flush=True)
            known = {**s, "hashes": input_hashes(s)}
            evaluation = Evaluation(settings=known, before=copy_of(nets), dataset=dataset, reward=reward, spec=spec, device=device)
            watch = evaluation.watch = make_watch(s, reward, spec, evaluation.before, second)
        if s["lambda_r"] > 0:
            reward_terms = RewardTerms(nets.G, nets.G_ema, reward, spec, reward_config(s))
            adam = lazy_adam(nets.G, OptimizerConfig(lr=s["rlr"]), None)
            phases.append(reward_phase(reward_terms, adam))
    loop = TrainingLoop(nets, dataset, phases, config, run_dir, options=s, augment_pipe=augment, on_tick=watch, ranks=ranks)
    return Objects(loop, evaluation)


def copy_of(nets: networks.Networks):
    """A frozen copy of the moving average before tuning."""
    return copy.deepcopy(nets.G_ema).eval().requires_grad_(False)


def run(s: dict, run_dir: Path, ranks: Ranks = SINGLE) -> Path:
    """Train with the settings in `run_dir`, then summarise a reward run. Returns run_dir, or the next free one where it was taken."""
    started = time.time()
    objects = build(s, run_dir, ranks)
    run_dir = Path(ranks.broadcast(str(run_folder.claim(run_dir, launch_identity())) if ranks.main else None))
    objects.loop.run_dir = objects.loop.records.run_dir = run_dir
    with RunLock(run_dir, enabled=ranks.main):
        if ranks.main:
            record = {**s, "versions": versions(), "hashes": input_hashes(s), "processes": ranks.world, "launch": launch_identity()}
            run_folder.clear(run_dir)
            storage.write_atomic(run_dir / run_folder.OPTIONS, json.dumps(record, indent=2, sort_keys=True).encode())
            where = f"{objects.loop.device}" + (f", {ranks.world} processes" if ranks.world > 1 else "")
            print(f"Run folder {run_dir}. Training for {s['kimg']:g} thousand images on {where}.", flush=True)
        _finish(objects, s, started)
    return run_dir


def resume(source: Path, previous: bool, kimg: float | None = None, ranks: Ranks = SINGLE) -> Path:
    """Continue a run from its checkpoint with its own settings, to another length if `kimg` is given. Returns the run folder."""
    started = time.time()
    run_dir = source if source.is_dir() else source.parent
    if ranks.restarts and checkpoint.available(run_dir):
        source = run_dir  # this very launch has come further than the checkpoint that it was given
    with RunLock(run_dir, enabled=ranks.main and run_dir.is_dir()):
        s = ranks.broadcast(checkpoint.read(source, previous)[1]["options"] if ranks.main else None)
        s = {"amp": "off", **s}  # runs of earlier versions
        if kimg is not None:
            s["kimg"] = kimg
        objects = build(s, run_dir, ranks, warm_start=False)  # the weights come from the checkpoint
        objects.loop.resume(source, previous)
        if objects.evaluation is not None:
            objects.evaluation.watch.restore(run_dir / "stats.jsonl")
        _finish(objects, s, started)
    return run_dir


def start_or_continue(s: dict, outdir: Path, ranks: Ranks = SINGLE) -> Path:
    """A new run in `outdir`; after a restart by torchrun, the run that this launch had begun. Returns the run folder."""
    begun = None
    if ranks.restarts:
        begun = ranks.broadcast(str(run_folder.of_launch(outdir, launch_identity()) or "") if ranks.main else None)
    if begun and ranks.broadcast(bool(checkpoint.available(Path(begun))) if ranks.main else None):
        return resume(Path(begun), previous=True, ranks=ranks)
    return run(s, Path(begun) if begun else run_folder.next_free(outdir, run_name(s)), ranks)


def _finish(objects: Objects, s: dict, started: float) -> None:
    objects.loop.run()
    if objects.loop.stopped is not None:
        return
    objects.loop.ranks.barrier()
    leave()  # the others need not wait for the evaluation
    if objects.evaluation is not None and not s["no_summary"]:
        finish(objects.evaluation, objects.loop, started)


def input_hashes(s: dict) -> dict[str, str]:
    """SHA-256 of the files that a run starts from."""
    files = {"init": bundled.GENERATOR if s["init"] == "bundled" else None}
    if s["reward"] == "sigma":
        files.update({"reward": s["reward_ckpt"], "watch": s["reward_watch"]})
    if s["init"] not in ("bundled", "scratch"):
        files["init"] = find_network(s["init"])
    return {k: file_hash(v) for k, v in files.items() if v is not None}

