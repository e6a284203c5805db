"""Compare all rewards on the bundled heads: accuracy on labels, and the effect of tuning on held-out latents.

Train and tune -> compute -> rewards.json -> rewards.md, rewards.png: `make rewards`. Letters: H, B height and
width of an image.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, load_comparison
from eg3d_rlhf.evaluation.heldout_evaluators import blind_pairs, compute_head_metrics, frechet
from eg3d_rlhf.evaluation.reward_comparison_entries import ENTRIES
from eg3d_rlhf.evaluation.run_images import BACK_VIEW, USUAL, ImageOptions, Side, choose_latents
from eg3d_rlhf.evaluation.summary import reward_shift
from eg3d_rlhf.evaluation.trainings import DOOR, TRAIN, TRAIN_REWARD, Part, make_with_progress_bar
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.experiments.media.sheet import SUPERSAMPLE, Row, look, paint, sheet, shrink, to_uint8
from eg3d_rlhf.experiments.pages import seed_range
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import figure_table, plot_rates, write
from eg3d_rlhf.generators import LoadedGenerator, camera, ws_of_seeds
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from eg3d_rlhf.tuning.gan.settings import DEMO_KIMG
from training.progress import tqdm
from training.storage import write_atomic

IMAGE = "rewards-latents.png"  # the same latents under every tuned network
HEADS = ("error_reduction", "intact_degraded", "face_moved_voxels")  # taken from `heads.compute_metrics`
BY_SEED = (*HEADS, "frechet_ratio")  # figures that are kept for each training seed


def length_of(full: bool) -> float:
    """Return the length of tuning in thousands of images: the demo's, or half of it in the short table."""
    return DEMO_KIMG if full else DEMO_KIMG / 2


def reward_of(out: Path, name: str) -> Path:
    """Return the path of a reward: the bundled file, or the one that its part trains."""
    return bundled.REWARD if ENTRIES[name].train is None else out / name / "reward" / "reward.safetensors"


def parts_of(out: Path, name: str, seeds: Sequence[int], full: bool, kimg: float) -> dict[str, Part]:
    """List the parts that train a reward and tune by it with each training seed, in the order of work.

    Args: out: parent of all folders; full: full instead of short training; kimg: length of tuning.
    """
    entry = ENTRIES[name]
    folder = out / name
    scripts: dict[str, tuple[str, list[str]]] = {}
    if entry.label:
        scripts["label"] = (
            DOOR,
            ["label", "synthetic", *entry.label, f"--out={folder / 'label' / 'labels.jsonl'}"],
        )
    if entry.train is not None:
        # the bundled pairs stay: they select the epoch and make the test set
        label_flags = (
            [f"--labels={BUNDLED_LABELS}", f"--unpaired={folder / 'label' / 'labels.jsonl'}"]
            if entry.label
            else []
        )
        scripts["reward"] = (
            TRAIN_REWARD,
            [*entry.train, *label_flags, *(() if full else entry.short), f"--run-dir={folder / 'reward'}"],
        )
    flags = [
        *entry.tune,
        f"--reward-ckpt={reward_of(out, name)}",
        f"--heldout-reward={bundled.WATCH}",
        f"--kimg={kimg:g}",
        "--no-summary",  # this report measures the networks itself
    ]
    scripts |= {f"seed{seed}": (TRAIN, [*flags, f"--seed={seed}"]) for seed in seeds}
    return {
        part: Part(f"{name}, {part}", folder / part, script, tuple(words))
        for part, (script, words) in scripts.items()
    }


def tuned(comparison: Comparison) -> dict:
    """Measure the effect of tuning: rewards, the annotator's preference, figures of heads, and images."""
    heads = compute_head_metrics(comparison)
    return (
        reward_shift(comparison)
        | blind_pairs(comparison)
        | {name: heads[name] for name in HEADS}
        | {"frechet_ratio": frechet(comparison)["frechet_ratio"]}
    )


def record(
    reward: Reward, tunings: Sequence[Mapping], seconds: Mapping[str, float], megabytes: float
) -> dict:
    """Combine the measurements of a reward to its entry in rewards.json.

    Args: tunings: result of `tuned` for each training seed; seconds: by part; megabytes: the largest peak
        memory of its processes.
    Raises: ValueError if the reward does not state its accuracy on held-out pairs.
    """
    # simulated labels also record the noise-free order, which measures accuracy without the labels' noise
    clean, labels = (reward.provenance.get(name) for name in ("test_accuracy_clean", "test_accuracy"))
    test = clean or labels  # with its interval and the number of pairs
    if test is None:
        raise ValueError(
            "rewards: the reward does not state its accuracy on held-out pairs. Train it with"
            " tools/train_reward.py."
        )
    wins = sum(tuning["win_rate"] for tuning in tunings) / len(tunings)
    n = tunings[0]["win_rate_n"]
    # one seed: the interval over latents; several: the range over seeds
    ends = (
        [tunings[0]["win_rate_ci95"][0], tunings[0]["win_rate_ci95"][1]]
        if len(tunings) == 1
        else [min(tuning["win_rate"] for tuning in tunings), max(tuning["win_rate"] for tuning in tunings)]
    )
    # a figure is None where no held-out head is defective, or none is intact
    by_seed = {name: [tuning[name] for tuning in tunings if tuning[name] is not None] for name in BY_SEED}
    return {
        "accuracy": test["accuracy"],
        "ci95": test["interval_95"],
        "n": test["n"],
        "against": "noise-free order" if clean else "labels",
        "accuracy_labels": labels and labels["accuracy"],  # against noisy labels
        "oracle_win_rate": wins,  # mean over training seeds
        "oracle_win_rate_range": ends,
        "oracle_n": n,  # latents
        **{name: float(np.mean(values)) if values else None for name, values in by_seed.items()},
        **{f"{name}_by_seed": values for name, values in by_seed.items()},
        "rewards_up": [tuning["reward_delta_positive"] for tuning in tunings],
        "rewards_n": tunings[0]["reward_delta_n"],
        "seconds": sum(seconds.values()),
        "seconds_by_part": dict(seconds),
        "memory_mb": megabytes,
        "seeds": len(tunings),  # number of training seeds
    }


def plot(data: Mapping):
    """Plot each reward's accuracy on held-out pairs, and how often the oracle prefers the tuned shape."""
    accuracy = {
        name: {"win_rate": row["accuracy"], "ci95": row["ci95"]} for name, row in data["rewards"].items()
    }
    oracle = {
        name: {"win_rate": row["oracle_win_rate"], "ci95": row["oracle_win_rate_range"]}
        for name, row in data["rewards"].items()
    }
    panels = [("accuracy on held-out pairs", accuracy), ("oracle prefers the tuned shape", oracle)]
    return plot_rates(panels, "95 %, Wilson; with several training seeds the range of the oracle's rates")


COLUMNS = {  # of the table: (words, format)
    "accuracy": ("accuracy", ".3f"),
    "rewards_up": ("rewards up", ".0f"),
    "oracle_win_rate": ("oracle prefers tuned", ".1%"),
    "error_reduction_by_seed": ("error reduction", ".0%"),
    "intact_degraded_by_seed": ("intact degraded", ".0%"),
    "face_moved_voxels_by_seed": ("face moved", ".3f"),
    "frechet_ratio_by_seed": ("image Fréchet, after / before", ".3f"),
    "seconds": ("seconds", ".0f"),
    "memory_mb": ("memory, MB", ".0f"),
}


def markdown(data: Mapping) -> str:
    """Format the table, and the text that describes how it was made."""
    arms = {
        f"{name} ({ENTRIES[name].words})": {
            **row,
            "accuracy_ci95": row["ci95"],
            "oracle_win_rate_ci95": row["oracle_win_rate_range"],
        }
        for name, row in data["rewards"].items()
    }
    table = figure_table("reward", arms, COLUMNS, intervals=("accuracy", "oracle_win_rate"))
    # all rewards share seeds, latents and held-out pairs, so the first one describes them
    first = next(iter(data["rewards"].values()))
    text = (
        f"{'Full' if data['full'] else 'Short'} table: {round(1000 * data['kimg'])} images of tuning,"
        f' {first["seeds"]} training seed(s). Accuracy is measured on {first["n"]} held-out pairs. "Rewards'
        f' up" counts the latents, of {first["rewards_n"]}, whose reward rose. The oracle compares the shapes'
        f" of {first['oracle_n']} latents, {seed_range(EVALUATION.all)}, at ψ 1."
        " Brackets: Wilson 95 %; with several training seeds, the range of the oracle's rates. The oracle"
        " is the simulated annotator without its noise: it applies the rule by which the labels of every"
        " reward here were made."
    )
    return "\n".join(["# Every reward on the bundled heads", "", *table, "", text, ""])


def strip(
    networks: Mapping[str, LoadedGenerator], seeds: Sequence[int], psi: float, o: ImageOptions = USUAL
) -> np.ndarray:
    """Render the same latents from the back under every network, one row for each; uint8 [H, B, 3]."""
    lines = []
    for name, loaded in networks.items():
        label = camera(loaded.generator, *BACK_VIEW)
        # [N, L, W] -> N of [1, L, W]: a field holds one shape here
        sides = [
            Side.of(loaded.generator, ws, o.resolution)
            for ws in ws_of_seeds(loaded.generator, seeds, truncation_psi=psi).split(1)
        ]
        with torch.no_grad():
            # rendered at SUPERSAMPLE times the cell's size and reduced, against aliasing
            cells = [
                to_uint8(shrink(paint(look(side.surface, label, o.cell * SUPERSAMPLE))).cpu())
                for side in sides
            ]
        lines.append(Row(cells=cells, name=name))
    return sheet("", lines, names=190)


def measured(
    out: Path, plans: Mapping[str, Mapping[str, Part]], jobs: int
) -> tuple[dict[str, dict], dict[str, LoadedGenerator], list[int]]:
    """Measure all tuned networks.

    Returns: the entries of rewards.json; the networks of the image, which are the one before tuning and the
    one that each reward tuned with its first seed; the latents of the image, which the first reward's scores
    before tuning select.
    """
    store = Store(out / "seen", renew=True)
    pairs: dict[str, Comparison] = {}

    def line(name: str) -> dict:
        """Measure the networks that a reward tuned."""
        figures = []
        for part in plans[name].values():
            # trainings of rewards and labellings have no network to measure
            if part.script == TRAIN and (run := part.run) is not None:
                c = load_comparison(Sources(run=run, after=run))
                pairs.setdefault(name, c)  # the first training seed is shown in the image
                # the names of version 0.1 stay in the hash, so that its measurements are found
                inputs = {
                    "before": c.before.hash,
                    "after": c.after.hash,
                    "figures": sorted(map(version_0_1.former, BY_SEED)),
                }
                made = store.make("tuned", inputs, partial(_tuned, c))
                figures.append(version_0_1.figures_of_tuning(made.record))
        costs = {key: done.record for key, part in plans[name].items() if (done := part.artefact())}
        seconds = {key: cost["seconds"] for key, cost in costs.items()}
        reward = load_reward(reward_of(out, name), "cpu")
        return record(reward, figures, seconds, max(cost["megabytes"] for cost in costs.values()))

    with tqdm(total=len(plans), desc="effect of tuning", unit="reward") as bar:
        lines = run_tasks(
            {name: [] for name in plans},
            lambda: line,
            (),
            jobs,
            out / "logs",
            lambda *_: bar.update() and None,
            stop=lambda: None,  # given: the tasks run in threads, which share the loaded networks
        )
    first = pairs[next(iter(plans))]
    networks = {"before": first.before, **{name: pairs[name].after for name in plans}}
    return {name: lines[name] for name in plans}, networks, choose_latents(first)


def _tuned(comparison: Comparison, _folder: Path) -> tuple[list[Path], dict]:
    return [], tuned(comparison)


def plans_of(out: Path, names: Sequence[str], seeds: Sequence[int], full: bool) -> dict[str, dict[str, Part]]:
    """List the parts that make every reward and tune by it."""
    return {name: parts_of(out, name, seeds, full, length_of(full)) for name in names}


def work(out: Path, names: Sequence[str], seeds: Sequence[int], full: bool, jobs: int) -> list[Path]:
    """Make what is missing; write rewards.json, rewards.md, rewards.png and rewards-latents.png.

    Returns the paths of these files.
    """
    plans = plans_of(out, names, seeds, full)
    # the cores are divided among the processes that run at the same time
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # the longest chain starts first, so that no core waits for it at the end
    longest_first = sorted(plans, key=lambda name: -ENTRIES[name].minutes)
    chains = [list(plans[name].values()) for name in longest_first]
    make_with_progress_bar(chains, jobs, threads, "rewards trained and tuned")
    lines, networks, shown = measured(out, plans, jobs)
    write_atomic(out / IMAGE, png(strip(networks, shown, 1.0)))
    data = {"rewards": lines, "full": full, "kimg": length_of(full)}
    return [*write(data, out, "rewards", markdown, plot), out / IMAGE]
