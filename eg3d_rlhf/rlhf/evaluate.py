"""Before and after a reward run: the figures that say whether it worked, and the files that show it.

Letters: N latents, L num_ws, W w_dim.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eg3d_rlhf import bundled, seeds
from eg3d_rlhf.cli import versions
from eg3d_rlhf.generators import latents, ws_of_seeds
from eg3d_rlhf.metrics.distances import FeatureStatistics
from eg3d_rlhf.metrics.features import load_features
from eg3d_rlhf.metrics.nearest_head import nearest_head_measures
from eg3d_rlhf.metrics.statistics import paired_summary, wilson_interval
from eg3d_rlhf.metrics.views import multi_view_measures, spec_for
from eg3d_rlhf.reward.reward import Reward
from eg3d_rlhf.rlhf.measures import annotator_calibration, rewards, utilities
from eg3d_rlhf.rlhf.watch import Watch
from eg3d_rlhf.settings import control_differs
from training import storage
from training.dataset import ImageFolderDataset

REWARD_SEEDS = seeds.LATENTS.take(100)
JUDGE_SEEDS, GEOMETRY_SEEDS = seeds.JUDGE.all, seeds.GEOMETRY.all
IMAGE_SEED = seeds.IMAGES.first
PSI = 0.7
IMAGES = 1600  # fakes per Fréchet distance
GEOMETRY_VIEWS = {"yaws": (-0.4, 0.0, 0.4), "samples": 32}


@dataclasses.dataclass
class Evaluation:
    """What a before/after comparison needs."""

    settings: dict
    before: torch.nn.Module  # frozen G_ema before tuning
    dataset: ImageFolderDataset
    reward: Reward
    device: torch.device
    watch: Watch | None = None

    @property
    def synthetic(self) -> bool:
        """Whether the true family, and with it the programmatic judge, applies."""
        return self.settings["data"].startswith("synthetic:")


def ws_for(G: torch.nn.Module, chosen) -> torch.Tensor:
    """ws [N, L, W] of held-out seeds at the evaluation's truncation."""
    return ws_of_seeds(G, list(chosen), truncation_psi=PSI)


def reward_shift(e: Evaluation, after: torch.nn.Module) -> dict:
    """Rewards of the same latents before and after."""
    before = rewards(e.before, ws_for(e.before, REWARD_SEEDS), e.reward)
    tuned = rewards(after, ws_for(after, REWARD_SEEDS), e.reward)
    delta = tuned - before
    return {
        "reward_before": {"mean": float(before.mean()), "std": float(before.std())},
        "reward_after": {"mean": float(tuned.mean()), "std": float(tuned.std())},
        "reward_delta_positive": int((delta > 0).sum()), "reward_delta_n": len(delta), "tuned_delta_mean": float(delta.mean()),
        "reward_deltas": delta.tolist(),
    }


def blind_pairs(e: Evaluation, after: torch.nn.Module) -> dict:
    """Share of held-out latents whose tuned shape the noise-free judge prefers; an exact tie counts half."""
    calibration = annotator_calibration()
    before = utilities(e.before, ws_for(e.before, JUDGE_SEEDS), calibration)
    tuned = utilities(after, ws_for(after, JUDGE_SEEDS), calibration)
    wins, ties = int((tuned > before).sum()), int((tuned == before).sum())
    low, high = wilson_interval(wins + ties // 2, len(before))
    return {
        "win_rate": (wins + 0.5 * ties) / len(before), "win_rate_ci95": [low, high], "win_rate_n": len(before), "win_rate_ties": ties,
        "utility_before": float(before.mean()), "utility_after": float(tuned.mean()),
    }


@torch.no_grad()
def fake_statistics(G: torch.nn.Module, e: Evaluation, features, bar: tqdm, batch: int = 16) -> FeatureStatistics:
    """Feature statistics of IMAGES fakes, seen from (and conditioned on) cameras of the data."""
    statistics = FeatureStatistics(features.dim)
    cameras = np.random.RandomState(IMAGE_SEED).randint(len(e.dataset), size=IMAGES)
    for start in range(0, IMAGES, batch):
        count = min(batch, IMAGES - start)
        z = latents(range(IMAGE_SEED + start, IMAGE_SEED + start + count), G.z_dim).to(e.device)
        c = torch.from_numpy(np.stack([e.dataset.get_label(int(i)) for i in cameras[start : start + count]])).to(e.device)
        torch.manual_seed(IMAGE_SEED + start)  # ray jitter, alike before and after
        statistics.update(features(G(z, c, noise_mode="const")["image"]))
        bar.update(count)
    return statistics


def frechet(e: Evaluation, after: torch.nn.Module, inception: str | None = None) -> dict:
    """Fréchet distance to the data before and after."""
    features = load_features(inception, e.device)
    real = FeatureStatistics(features.dim)
    for start in range(0, len(e.dataset), 64):
        batch = np.stack([e.dataset[i][0] for i in range(start, min(start + 64, len(e.dataset)))])
        real.update(features(torch.from_numpy(batch).to(e.device).float() / 127.5 - 1))
    with tqdm(total=2 * IMAGES, desc="images for the Fréchet distance", unit="image") as bar:
        before, tuned = (fake_statistics(G, e, features, bar).distance(real) for G in (e.before, after))
    return {
        "frechet_before": before, "frechet_after": tuned, "frechet_ratio": tuned / before, "frechet_features": features.name,
        "frechet_images": IMAGES,
    }


def geometry(e: Evaluation, after: torch.nn.Module) -> dict:
    """Measures that the annotator never used; lower is better. 'better' compares means, with the paired interval beside it."""
    values: dict[str, list[np.ndarray]] = {}
    fits = 1 if e.synthetic else 0
    with tqdm(total=2 * (1 + fits) * len(GEOMETRY_SEEDS), desc="independent geometry measures", unit="shape") as bar:
        for G in (e.before, after):
            ws = ws_for(G, GEOMETRY_SEEDS)
            found = multi_view_measures(G, ws, spec_for(G, **GEOMETRY_VIEWS), on_batch=bar.update)
            measures = {
                "photometric reprojection error": found.photometric, "depth disagreement": found.depth,
                "normal disagreement (degrees)": found.normal,
            }
            if e.synthetic:
                measures["distance to the nearest head"] = nearest_head_measures(G, ws, on_batch=bar.update).distance
            for name, value in measures.items():
                values.setdefault(name, []).append(value)
    rows = []
    for name, (before, tuned) in values.items():
        summary = paired_summary(before, tuned).to_dict()
        rows.append({
            "name": name, "before": float(before.mean()), "after": float(tuned.mean()), "better": bool(tuned.mean() <= before.mean()),
            "paired": summary,
        })
    return {"geometry": rows, "geometry_n": len(GEOMETRY_SEEDS)}


def control_figures(settings: dict, delta: float) -> dict:
    """Mean reward delta of the lambda_r = 0 run: this run's own where it is the control, else that of --control, else the recorded one.

    None, and what to do about it, where that run's settings are not those of this one.
    """
    if settings["lambda_r"] == 0:
        return {"control_delta_mean": delta, "control_source": "this run"}
    path = bundled.CONTROL if settings["control"] is None else Path(settings["control"])
    path = path / "summary.json" if path.is_dir() else path
    record = json.loads(path.read_text())
    options = path.parent / "training_options.json"  # older summaries do not hold their settings
    known = record.get("settings") or (json.loads(options.read_text()) if options.is_file() else {})
    differ = control_differs(settings, {"kimg": record["images"] / 1000, "seed": record["seed"], "lambda_r": record["lambda_r"], **known})
    if differ:
        remedy = "Run the same command with --lambda-r=0, and pass its folder as --control."
        return {"control_delta_mean": None, "control_source": f"{path.name} is of another run: {'; '.join(differ[:4])}. {remedy}"}
    return {"control_delta_mean": record["tuned_delta_mean"], "control_source": path.name}


def reward_accuracy(meta: dict) -> dict:
    """The reward's own record (its provenance) of its held-out accuracy, against the noise-free order where the labels held one."""
    against = "noise-free order" if meta.get("test_accuracy_clean") else "labels"
    found = meta.get("test_accuracy_clean") or meta.get("test_accuracy")
    if found is None:
        return {"reward_test_accuracy": None}
    return {
        "reward_test_accuracy": found["accuracy"], "reward_test_accuracy_ci95": found["interval_95"], "reward_test_n": found["n"],
        "reward_test_against": against,
    }


def summarise(e: Evaluation, after: torch.nn.Module, cur_nimg: int) -> dict:
    """All figures of a run, as JSON values."""
    s = e.settings
    record = reward_shift(e, after)
    record.update(control_figures(s, record["tuned_delta_mean"]))
    if e.synthetic:
        record.update(blind_pairs(e, after))
        record.update(frechet(e, after))
    record.update(geometry(e, after))
    record.update(reward_accuracy(e.reward.provenance))
    record.update({
        "over_optimisation": e.watch.alarms if e.watch is not None else [], "seed": s["seed"],
        "device": str(e.device), "versions": versions(), "lambda_r": s["lambda_r"], "lambda_sigma": s["lambda_sigma"], "images": cur_nimg,
        "seeds": {"reward": [REWARD_SEEDS[0], REWARD_SEEDS[-1]], "judge": [JUDGE_SEEDS[0], JUDGE_SEEDS[-1]], "psi": PSI},
    })
    return record


def finish(e: Evaluation, loop, started: float) -> dict:
    """Evaluate the finished loop and write summary.json, pictures and meshes into its folder; prints the table."""
    from eg3d_rlhf.reports.summary import print_summary, write_pictures

    print("Comparing before and after on held-out latents (about a minute on 2 cores).", flush=True)
    after = loop.subject.nets.G_ema
    record = summarise(e, after, loop.cur_nimg)
    record["seconds"] = time.time() - started
    storage.write_atomic(loop.files.folder / "summary.json", json.dumps(record, indent=2, sort_keys=True).encode())
    write_pictures(e.before, after, loop.files.folder, record)
    print_summary(record, loop.files.folder)
    return record
