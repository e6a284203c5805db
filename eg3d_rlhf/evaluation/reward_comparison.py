"""Compare all rewards on the bundled heads: accuracy on labels, and the effect of tuning on held-out latents.

`make rewards` trains the rewards, tunes the generator by each, measures the tuned networks, and writes
rewards.json, rewards.md, rewards.png and rewards-latents.png.
Shapes: L num_ws, W w_dim; H and B height and width of an image.
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
from eg3d_rlhf.evaluation.trainings import PACKAGE, TRAIN, TRAIN_REWARD, Part, make_with_progress_bar
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
HEADS = ("error_reduction", "intact_degraded", "face_moved_voxels")  # keys of `heads.compute_metrics`
BY_SEED = (*HEADS, "frechet_ratio")  # metrics that are stored for each training seed


def tuning_kimg(full: bool) -> float:
    """Return the length of tuning in thousands of images.

    It is the length of the demo for the full table, and half of it for the short table.
    """
    return DEMO_KIMG if full else DEMO_KIMG / 2


def reward_path(out: Path, name: str) -> Path:
    """Return the file of a reward, which is the bundled file or the one that `make rewards` trains."""
    return bundled.REWARD if ENTRIES[name].train is None else out / name / "reward" / "reward.safetensors"


def parts_of(out: Path, name: str, seeds: Sequence[int], full: bool, kimg: float) -> dict[str, Part]:
    """Return the steps that train a reward and tune the generator by it, in the order in which they run.

    Args:
        out: parent of all folders.
        name: name of the reward in ENTRIES.
        seeds: training seeds of tuning.
        full: True: full training of the reward; False: short training.
        kimg: length of tuning, in thousands of images.
    """
    reward_entry = ENTRIES[name]
    folder = out / name
    script_by_part: dict[str, tuple[str, list[str]]] = {}
    if reward_entry.label:
        script_by_part["label"] = (
            PACKAGE,
            ["label", "synthetic", *reward_entry.label, f"--out={folder / 'label' / 'labels.jsonl'}"],
        )
    if reward_entry.train is not None:
        # If the reward is trained on its own labels, the bundled pairs are still passed: they select the best
        # epoch, and measure the accuracy.
        label_flags = (
            [f"--labels={BUNDLED_LABELS}", f"--unpaired={folder / 'label' / 'labels.jsonl'}"]
            if reward_entry.label
            else []
        )
        script_by_part["reward"] = (
            TRAIN_REWARD,
            [
                *reward_entry.train,
                *label_flags,
                *(() if full else reward_entry.short),
                f"--run-dir={folder / 'reward'}",
            ],
        )
    flags = [
        *reward_entry.tune,
        f"--reward-ckpt={reward_path(out, name)}",
        f"--heldout-reward={bundled.HELDOUT_REWARD}",
        f"--kimg={kimg:g}",
        "--no-summary",  # since this report measures the networks
    ]
    script_by_part |= {f"seed{seed}": (TRAIN, [*flags, f"--seed={seed}"]) for seed in seeds}
    return {
        part: Part(f"{name}, {part}", folder / part, script, tuple(flags))
        for part, (script, flags) in script_by_part.items()
    }


def measure_tuning(comparison: Comparison) -> dict:
    """Measure the effect of tuning on rewards, the simulated annotator's preference, heads, and images."""
    head_metrics = compute_head_metrics(comparison)
    return (
        reward_shift(comparison)
        | blind_pairs(comparison)
        | {name: head_metrics[name] for name in HEADS}
        | {"frechet_ratio": frechet(comparison)["frechet_ratio"]}
    )


def record(
    reward: Reward, tunings: Sequence[Mapping], seconds: Mapping[str, float], megabytes: float
) -> dict:
    """Combine the measurements of a reward into its entry in rewards.json.

    Args:
        reward: the reward.
        tunings: result of `measure_tuning` for each training seed.
        seconds: duration of each step.
        megabytes: largest peak memory of a step.

    Raises: ValueError if the file of the reward does not state its accuracy on held-out pairs.
    """
    # Simulated labels also record the noise-free order. The accuracy against this order does not contain the
    # noise of the labels, so it is preferred.
    clean_accuracy, label_accuracy = (
        reward.provenance.get(name) for name in ("test_accuracy_clean", "test_accuracy")
    )
    test_accuracy = clean_accuracy or label_accuracy  # with its interval and the number of pairs
    if test_accuracy is None:
        raise ValueError(
            "The file of the reward does not state its accuracy on held-out pairs. Train the reward with"
            " tools/train_reward.py, which records it."
        )
    win_rate = sum(tuning["win_rate"] for tuning in tunings) / len(tunings)
    latent_count = tunings[0]["win_rate_n"]
    # With one seed, this is the interval over latents; with several seeds, the range over seeds.
    win_rate_range = (
        [tunings[0]["win_rate_ci95"][0], tunings[0]["win_rate_ci95"][1]]
        if len(tunings) == 1
        else [min(tuning["win_rate"] for tuning in tunings), max(tuning["win_rate"] for tuning in tunings)]
    )
    # A metric is None if no held-out head is defective, or if none is intact.
    by_seed = {name: [tuning[name] for tuning in tunings if tuning[name] is not None] for name in BY_SEED}
    return {
        "accuracy": test_accuracy["accuracy"],
        "ci95": test_accuracy["interval_95"],
        "n": test_accuracy["n"],
        "against": "noise-free order" if clean_accuracy else "labels",
        "accuracy_labels": label_accuracy and label_accuracy["accuracy"],  # against noisy labels
        "oracle_win_rate": win_rate,  # mean over training seeds
        "oracle_win_rate_range": win_rate_range,
        "oracle_n": latent_count,  # latents
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
    """Plot each reward's accuracy on held-out pairs, and how often the oracle prefers the tuned shape.

    The oracle is the simulated annotator without noise.
    """
    # `plot_rates` reads rates under the names "win_rate" and "ci95".
    accuracy = {
        name: {"win_rate": row["accuracy"], "ci95": row["ci95"]} for name, row in data["rewards"].items()
    }
    oracle = {
        name: {"win_rate": row["oracle_win_rate"], "ci95": row["oracle_win_rate_range"]}
        for name, row in data["rewards"].items()
    }
    panels = [("accuracy on held-out pairs", accuracy), ("oracle prefers the tuned shape", oracle)]
    return plot_rates(panels, "95 %, Wilson; with several training seeds the range of the oracle's rates")


COLUMNS = {  # key of a metric -> (heading of the table, format)
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
    """Format rewards.md: the table, and the text that describes how it was made."""
    arms = {
        f"{name} ({ENTRIES[name].words})": {
            **row,
            "accuracy_ci95": row["ci95"],
            "oracle_win_rate_ci95": row["oracle_win_rate_range"],
        }
        for name, row in data["rewards"].items()
    }
    table = figure_table("reward", arms, COLUMNS, intervals=("accuracy", "oracle_win_rate"))
    # All rewards have the same seeds, latents and held-out pairs, so the first row describes them.
    first_row = next(iter(data["rewards"].values()))
    text = (
        f"{'Full' if data['full'] else 'Short'} table: {round(1000 * data['kimg'])} images of tuning,"
        f" {first_row['seeds']} training seed(s). Accuracy is measured on {first_row['n']} held-out pairs."
        f' "Rewards up" counts the latents, of {first_row["rewards_n"]}, whose reward rose.'
        f" The oracle compares the shapes of {first_row['oracle_n']} latents, {seed_range(EVALUATION.seeds)},"
        " at ψ 1. Brackets: Wilson 95 %; with several training seeds, the range of the oracle's rates. The"
        " oracle is the simulated annotator without its noise: it applies the rule by which the labels of"
        " every reward here were made."
    )
    return "\n".join(["# Every reward on the bundled heads", "", *table, "", text, ""])


def render_strip(
    networks: Mapping[str, LoadedGenerator], seeds: Sequence[int], psi: float, options: ImageOptions = USUAL
) -> np.ndarray:
    """Render the same latents from the back under every network.

    Args:
        networks: networks by name.
        seeds: seeds of the latents.
        psi: truncation.

    Returns: an image with a row for each network, uint8 [H, B, 3].
    """
    image_rows = []
    for name, loaded in networks.items():
        camera_label = camera(loaded.generator, *BACK_VIEW)
        # ws [N, L, W] are split into N times [1, L, W], so that each field holds one shape.
        sides = [
            Side.from_ws(loaded.generator, ws, options.resolution)
            for ws in ws_of_seeds(loaded.generator, seeds, truncation_psi=psi).split(1)
        ]
        with torch.no_grad():
            # rendered with SUPERSAMPLE times the pixels and then reduced, to avoid aliasing
            cells = [
                to_uint8(shrink(paint(look(side.surface, camera_label, options.cell * SUPERSAMPLE))).cpu())
                for side in sides
            ]
        image_rows.append(Row(cells=cells, name=name))
    return sheet("", image_rows, names=190)


def measure_networks(
    out: Path, plans: Mapping[str, Mapping[str, Part]], jobs: int
) -> tuple[dict[str, dict], dict[str, LoadedGenerator], list[int]]:
    """Measure all tuned networks.

    Args:
        out: folder of the report.
        plans: steps of each reward, as `parts_of` returns them.
        jobs: number of networks that are measured at the same time.

    Returns:
        the entries of rewards.json by name of the reward;
        the networks of the image: the network before tuning, and for each reward the one tuned with the first
        training seed;
        the seeds of the image, which are selected by the first reward's scores before tuning.
    """
    store = Store(out / "seen", renew=True)
    first_comparison_by_reward: dict[str, Comparison] = {}

    def measure_reward(name: str) -> dict:
        """Measure the networks that were tuned by a reward, and return its entry in rewards.json."""
        tuning_metrics = []
        for part in plans[name].values():
            # Only the runs of train.py have a network to measure.
            if part.script == TRAIN and (run := part.run) is not None:
                comparison = load_comparison(Sources(run=run, after=run))
                first_comparison_by_reward.setdefault(
                    name, comparison
                )  # the image shows the first training seed
                # The hash contains the metrics' names of version 0.1, so that its stored results are found.
                inputs = {
                    "before": comparison.before.hash,
                    "after": comparison.after.hash,
                    "figures": sorted(map(version_0_1.former, BY_SEED)),
                }
                artefact = store.make("tuned", inputs, partial(_measure_for_store, comparison))
                tuning_metrics.append(version_0_1.figures_of_tuning(artefact.record))
        costs = {
            key: finished_artefact.record
            for key, part in plans[name].items()
            if (finished_artefact := part.artefact())
        }
        seconds = {key: cost["seconds"] for key, cost in costs.items()}
        reward = load_reward(reward_path(out, name), "cpu")
        return record(reward, tuning_metrics, seconds, max(cost["megabytes"] for cost in costs.values()))

    with tqdm(total=len(plans), desc="effect of tuning", unit="reward") as bar:
        entries = run_tasks(
            {name: [] for name in plans},
            lambda: measure_reward,
            (),
            jobs,
            out / "logs",
            lambda *_: bar.update() and None,
            # With a `stop` function the tasks run in threads, which share the loaded networks.
            stop=lambda: None,
        )
    shown_comparison = first_comparison_by_reward[next(iter(plans))]
    networks = {
        "before": shown_comparison.before,
        **{name: first_comparison_by_reward[name].after for name in plans},
    }
    return {name: entries[name] for name in plans}, networks, choose_latents(shown_comparison)


def _measure_for_store(comparison: Comparison, _folder: Path) -> tuple[list[Path], dict]:
    """Measure the effect of tuning, in the form that `Store.make` needs: no files, and a record."""
    return [], measure_tuning(comparison)


def plans_of(out: Path, names: Sequence[str], seeds: Sequence[int], full: bool) -> dict[str, dict[str, Part]]:
    """Return for each reward the steps that train it and tune the generator by it, see `parts_of`."""
    return {name: parts_of(out, name, seeds, full, tuning_kimg(full)) for name in names}


def work(out: Path, names: Sequence[str], seeds: Sequence[int], full: bool, jobs: int) -> list[Path]:
    """Run the missing steps, and write rewards.json, rewards.md, rewards.png and rewards-latents.png.

    Args:
        out: folder of the report.
        names: names of the rewards.
        seeds: training seeds of tuning.
        full: True: full trainings; False: short ones.
        jobs: number of steps that run at the same time.

    Returns: the paths of the four files.
    """
    plans = plans_of(out, names, seeds, full)
    # The cores are divided among the processes that run at the same time.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # The longest chain starts first, so that the other processes do not wait for it at the end.
    longest_first = sorted(plans, key=lambda name: -ENTRIES[name].minutes)
    chains = [list(plans[name].values()) for name in longest_first]
    make_with_progress_bar(chains, jobs, threads, "rewards trained and tuned")
    entries, networks, shown_seeds = measure_networks(out, plans, jobs)
    write_atomic(out / IMAGE, png(render_strip(networks, shown_seeds, 1.0)))
    data = {"rewards": entries, "full": full, "kimg": tuning_kimg(full)}
    return [*write(data, out, "rewards", markdown, plot), out / IMAGE]
