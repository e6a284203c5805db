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
from training.config import number_text
from training.progress import tqdm
from training.storage import write_atomic

IMAGE = "rewards-latents.png"  # the same latents under every tuned network
HEADS = ("error_reduction", "intact_degraded", "face_moved_voxels")  # keys of `heads.compute_metrics`
BY_SEED = (*HEADS, "frechet_ratio")  # metrics that are stored for each training seed


def tuning_kimg(is_full: bool) -> float:
    """Return the length of tuning in thousands of images.

    It is the length of the demo for the full table, and half of it for the short table.

    Args: is_full: True for the full table, False for the short one.
    """
    return DEMO_KIMG if is_full else DEMO_KIMG / 2


def reward_path(report_folder: Path, reward_name: str) -> Path:
    """Return the file of a reward, which is the bundled file or the one that `make rewards` trains.

    Args:
        report_folder: folder of the report.
        reward_name: name of the reward in ENTRIES.
    """
    return (
        bundled.REWARD
        if ENTRIES[reward_name].train is None
        else report_folder / reward_name / "reward" / "reward.safetensors"
    )


def parts_of(
    parent_folder: Path, reward_name: str, seeds: Sequence[int], is_full: bool, kimg: float
) -> dict[str, Part]:
    """Return the steps that train a reward and tune the generator by it, in the order in which they run.

    Args:
        parent_folder: parent of all folders.
        reward_name: name of the reward in ENTRIES.
        seeds: training seeds of tuning.
        is_full: True for the full training of the reward, False for the short one.
        kimg: length of tuning, in thousands of images.
    """
    reward_entry = ENTRIES[reward_name]
    reward_folder = parent_folder / reward_name
    script_by_part: dict[str, tuple[str, list[str]]] = {}
    if reward_entry.label:
        script_by_part["label"] = (
            PACKAGE,
            ["label", "synthetic", *reward_entry.label, f"--out={reward_folder / 'label' / 'labels.jsonl'}"],
        )
    if reward_entry.train is not None:
        # If the reward is trained on its own labels, the bundled pairs are still passed: they select the best
        # epoch, and measure the accuracy.
        label_flags = (
            [f"--labels={BUNDLED_LABELS}", f"--unpaired={reward_folder / 'label' / 'labels.jsonl'}"]
            if reward_entry.label
            else []
        )
        script_by_part["reward"] = (
            TRAIN_REWARD,
            [
                *reward_entry.train,
                *label_flags,
                *(() if is_full else reward_entry.short),
                f"--run-dir={reward_folder / 'reward'}",
            ],
        )
    flags = [
        *reward_entry.tune,
        f"--reward-ckpt={reward_path(parent_folder, reward_name)}",
        f"--heldout-reward={bundled.HELDOUT_REWARD}",
        f"--kimg={number_text(kimg)}",
        "--no-summary",  # since this report measures the networks
        "--weak-reward",  # since this report also compares rewards that are not above chance
    ]
    script_by_part |= {f"seed{seed}": (TRAIN, [*flags, f"--seed={seed}"]) for seed in seeds}
    return {
        part_name: Part(f"{reward_name}, {part_name}", reward_folder / part_name, script, tuple(flags))
        for part_name, (script, flags) in script_by_part.items()
    }


def measure_tuning(comparison: Comparison) -> dict:
    """Measure the effect of tuning on rewards, the simulated annotator's preference, heads, and images.

    Returns: dict of metrics by name.
    """
    head_metrics = compute_head_metrics(comparison)
    return (
        reward_shift(comparison)
        | blind_pairs(comparison)
        | {metric_name: head_metrics[metric_name] for metric_name in HEADS}
        | {"frechet_ratio": frechet(comparison)["frechet_ratio"]}
    )


def record(
    reward: Reward,
    tuning_metrics: Sequence[Mapping],
    seconds_by_part: Mapping[str, float],
    peak_megabytes: float,
) -> dict:
    """Combine the measurements of a reward into its entry in rewards.json.

    Args:
        reward: the reward.
        tuning_metrics: result of `measure_tuning` for each training seed.
        seconds_by_part: duration of each step.
        peak_megabytes: largest peak memory of a step.

    Raises: ValueError if the file of the reward does not state its accuracy on held-out pairs.
    """
    # Simulated labels also record the noise-free order. The accuracy against this order does not contain the
    # noise of the labels, so it is preferred.
    clean_accuracy, label_accuracy = (
        reward.provenance.get(metric_name) for metric_name in ("test_accuracy_clean", "test_accuracy")
    )
    test_accuracy = clean_accuracy or label_accuracy  # with its interval and the number of pairs
    if test_accuracy is None:
        raise ValueError(
            "The file of the reward does not state its accuracy on held-out pairs. Train the reward with"
            " tools/train_reward.py, which records it."
        )
    win_rate = sum(seed_metrics["win_rate"] for seed_metrics in tuning_metrics) / len(tuning_metrics)
    latent_count = tuning_metrics[0]["win_rate_n"]
    # With one seed, this is the interval over latents; with several seeds, the range over seeds.
    win_rate_range = (
        [tuning_metrics[0]["win_rate_ci95"][0], tuning_metrics[0]["win_rate_ci95"][1]]
        if len(tuning_metrics) == 1
        else [
            min(seed_metrics["win_rate"] for seed_metrics in tuning_metrics),
            max(seed_metrics["win_rate"] for seed_metrics in tuning_metrics),
        ]
    )
    # A metric is None if no held-out head is defective, or if none is intact.
    values_by_metric = {
        metric_name: [
            seed_metrics[metric_name]
            for seed_metrics in tuning_metrics
            if seed_metrics[metric_name] is not None
        ]
        for metric_name in BY_SEED
    }
    return {
        "accuracy": test_accuracy["accuracy"],
        "ci95": test_accuracy["interval_95"],
        "n": test_accuracy["n"],
        "against": "noise-free order" if clean_accuracy else "labels",
        "accuracy_labels": label_accuracy and label_accuracy["accuracy"],  # against noisy labels
        "oracle_win_rate": win_rate,  # mean over training seeds
        "oracle_win_rate_range": win_rate_range,
        "oracle_n": latent_count,  # latents
        **{
            metric_name: float(np.mean(seed_values)) if seed_values else None
            for metric_name, seed_values in values_by_metric.items()
        },
        **{f"{metric_name}_by_seed": seed_values for metric_name, seed_values in values_by_metric.items()},
        "rewards_up": [seed_metrics["reward_delta_positive"] for seed_metrics in tuning_metrics],
        "rewards_n": tuning_metrics[0]["reward_delta_n"],
        "seconds": sum(seconds_by_part.values()),
        "seconds_by_part": dict(seconds_by_part),
        "memory_mb": peak_megabytes,
        "seeds": len(tuning_metrics),  # number of training seeds
    }


def plot(comparison_data: Mapping):
    """Plot each reward's accuracy on held-out pairs, and how often the oracle prefers the tuned shape.

    The oracle is the simulated annotator without noise.

    Args: comparison_data: content of rewards.json.
    """
    # `plot_rates` reads rates under the names "win_rate" and "ci95".
    accuracy_by_reward = {
        reward_name: {"win_rate": reward_entry["accuracy"], "ci95": reward_entry["ci95"]}
        for reward_name, reward_entry in comparison_data["rewards"].items()
    }
    oracle_rate_by_reward = {
        reward_name: {
            "win_rate": reward_entry["oracle_win_rate"],
            "ci95": reward_entry["oracle_win_rate_range"],
        }
        for reward_name, reward_entry in comparison_data["rewards"].items()
    }
    panels = [
        ("accuracy on held-out pairs", accuracy_by_reward),
        ("oracle prefers the tuned shape", oracle_rate_by_reward),
    ]
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


def markdown(comparison_data: Mapping) -> str:
    """Format rewards.md: the table, and the text that describes how it was made.

    Args: comparison_data: content of rewards.json.
    """
    entry_by_heading = {
        f"{reward_name} ({ENTRIES[reward_name].words})": {
            **reward_entry,
            "accuracy_ci95": reward_entry["ci95"],
            "oracle_win_rate_ci95": reward_entry["oracle_win_rate_range"],
        }
        for reward_name, reward_entry in comparison_data["rewards"].items()
    }
    table_lines = figure_table("reward", entry_by_heading, COLUMNS, intervals=("accuracy", "oracle_win_rate"))
    # All rewards have the same seeds, latents and held-out pairs, so the first row describes them.
    first_entry = next(iter(comparison_data["rewards"].values()))
    explanation = (
        f"{'Full' if comparison_data['full'] else 'Short'} table: {round(1000 * comparison_data['kimg'])}"
        f" images of tuning, {first_entry['seeds']} training seed(s). Accuracy is measured on"
        f" {first_entry['n']} held-out pairs."
        f' "Rewards up" counts the latents, of {first_entry["rewards_n"]}, whose reward rose.'
        f" The oracle compares the shapes of {first_entry['oracle_n']} latents,"
        f" {seed_range(EVALUATION.seeds)}, at ψ 1. Brackets: Wilson 95 %; with several training seeds, the"
        " range of the oracle's rates. The oracle is the simulated annotator without its noise: it applies"
        " the rule by which the labels of every reward here were made."
    )
    return "\n".join(["# Every reward on the bundled heads", "", *table_lines, "", explanation, ""])


def render_strip(
    generator_by_name: Mapping[str, LoadedGenerator],
    seeds: Sequence[int],
    psi: float,
    image_options: ImageOptions = USUAL,
) -> np.ndarray:
    """Render the shapes that every network generates from the same latents, seen from the back.

    Args:
        generator_by_name: networks by name.
        seeds: seeds of the latents.
        psi: truncation.
        image_options: sizes of the image.

    Returns: an image with a row for each network, uint8 [H, B, 3].
    """
    image_rows = []
    for network_name, loaded_generator in generator_by_name.items():
        camera_label = camera(loaded_generator.generator, *BACK_VIEW)
        # ws [N, L, W] are split into N times [1, L, W], so that each field holds one shape.
        sides = [
            Side.from_ws(loaded_generator.generator, ws, image_options.resolution)
            for ws in ws_of_seeds(loaded_generator.generator, seeds, truncation_psi=psi).split(1)
        ]
        with torch.no_grad():
            # rendered with SUPERSAMPLE times the pixels and then reduced, to avoid aliasing
            cell_images = [
                to_uint8(
                    shrink(paint(look(side.surface, camera_label, image_options.cell * SUPERSAMPLE))).cpu()
                )
                for side in sides
            ]
        image_rows.append(Row(cells=cell_images, name=network_name))
    return sheet("", image_rows, name_width=190)


def measure_networks(
    report_folder: Path, parts_by_reward: Mapping[str, Mapping[str, Part]], process_count: int
) -> tuple[dict[str, dict], dict[str, LoadedGenerator], list[int]]:
    """Measure all tuned networks.

    Args:
        report_folder: folder of the report.
        parts_by_reward: steps of each reward, as `parts_of` returns them.
        process_count: number of networks that are measured at the same time.

    Returns: three values. The first maps the name of each reward to its entry in rewards.json. The second
        maps names to the networks of the image: the network before tuning, and for each reward the network
        that was tuned with the first training seed. The third holds the seeds of the image, which are
        selected by the first reward's scores before tuning.
    """
    store = Store(report_folder / "seen", renew=True)
    first_comparison_by_reward: dict[str, Comparison] = {}

    def measure_reward(reward_name: str) -> dict:
        """Measure the networks that were tuned by a reward, and return its entry in rewards.json."""
        tuning_metrics = []
        for part in parts_by_reward[reward_name].values():
            # Only the runs of train.py have a network to measure.
            if part.script == TRAIN and (run_folder := part.run) is not None:
                comparison = load_comparison(Sources(run=run_folder, after=run_folder))
                # the image shows the first training seed
                first_comparison_by_reward.setdefault(reward_name, comparison)
                # The hash contains the metrics' names of version 0.1, so that its stored results are found.
                store_inputs = {
                    "before": comparison.before.hash,
                    "after": comparison.after.hash,
                    "figures": sorted(map(version_0_1.former, BY_SEED)),
                }
                artefact = store.make("tuned", store_inputs, partial(_measure_for_store, comparison))
                tuning_metrics.append(version_0_1.figures_of_tuning(artefact.record))
        cost_by_part = {
            part_name: finished_artefact.record
            for part_name, part in parts_by_reward[reward_name].items()
            if (finished_artefact := part.artefact())
        }
        seconds_by_part = {part_name: part_cost["seconds"] for part_name, part_cost in cost_by_part.items()}
        reward = load_reward(reward_path(report_folder, reward_name), "cpu")
        return record(
            reward,
            tuning_metrics,
            seconds_by_part,
            max(part_cost["megabytes"] for part_cost in cost_by_part.values()),
        )

    with tqdm(total=len(parts_by_reward), desc="effect of tuning", unit="reward") as bar:
        entry_by_reward = run_tasks(
            {reward_name: [] for reward_name in parts_by_reward},
            lambda: measure_reward,
            (),
            process_count,
            report_folder / "logs",
            lambda *_: bar.update() and None,
            # With a `stop` function the tasks run in threads, which share the loaded networks.
            stop=lambda: None,
        )
    shown_comparison = first_comparison_by_reward[next(iter(parts_by_reward))]
    generator_by_name = {
        "before": shown_comparison.before,
        **{reward_name: first_comparison_by_reward[reward_name].after for reward_name in parts_by_reward},
    }
    return (
        {reward_name: entry_by_reward[reward_name] for reward_name in parts_by_reward},
        generator_by_name,
        choose_latents(shown_comparison),
    )


def _measure_for_store(comparison: Comparison, _folder: Path) -> tuple[list[Path], dict]:
    """Measure the effect of tuning, and return it as `Store.make` requires: a list of files, and a record.

    The list is empty, since the measurement writes no files.
    """
    return [], measure_tuning(comparison)


def plans_of(
    report_folder: Path, reward_names: Sequence[str], seeds: Sequence[int], is_full: bool
) -> dict[str, dict[str, Part]]:
    """Return for each reward the steps that train it and tune the generator by it, see `parts_of`."""
    return {
        reward_name: parts_of(report_folder, reward_name, seeds, is_full, tuning_kimg(is_full))
        for reward_name in reward_names
    }


def work(
    report_folder: Path, reward_names: Sequence[str], seeds: Sequence[int], is_full: bool, process_count: int
) -> list[Path]:
    """Run the missing steps, and write rewards.json, rewards.md, rewards.png and rewards-latents.png.

    Args:
        report_folder: folder of the report.
        reward_names: names of the rewards.
        seeds: training seeds of tuning.
        is_full: True for full trainings, False for short ones.
        process_count: number of steps that run at the same time.

    Returns: the paths of the four files.
    """
    parts_by_reward = plans_of(report_folder, reward_names, seeds, is_full)
    # The cores are divided among the processes that run at the same time.
    thread_count = max(1, (os.cpu_count() or 1) // process_count)
    # The longest chain starts first, so that the other processes do not wait for it at the end.
    longest_first = sorted(parts_by_reward, key=lambda reward_name: -ENTRIES[reward_name].minutes)
    chains = [list(parts_by_reward[reward_name].values()) for reward_name in longest_first]
    make_with_progress_bar(chains, process_count, thread_count, "rewards trained and tuned")
    entry_by_reward, generator_by_name, shown_seeds = measure_networks(
        report_folder, parts_by_reward, process_count
    )
    write_atomic(report_folder / IMAGE, png(render_strip(generator_by_name, shown_seeds, 1.0)))
    comparison_data = {"rewards": entry_by_reward, "full": is_full, "kimg": tuning_kimg(is_full)}
    return [*write(comparison_data, report_folder, "rewards", markdown, plot), report_folder / IMAGE]
