"""The end of a reward run: the comparison of before and after that says whether it worked, its table, pictures and meshes.

Letters: N latents.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eg3d_rlhf import bundled
from eg3d_rlhf.cli import versions
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.geometry import view_measures
from eg3d_rlhf.evaluation.images import image_from, images_of, open_data
from eg3d_rlhf.generators import Generator, LoadedGenerator, of
from eg3d_rlhf.metrics.distances import FeatureStatistics
from eg3d_rlhf.metrics.evaluation import real_batches
from eg3d_rlhf.metrics.features import load_features
from eg3d_rlhf.metrics.nearest_head import nearest_head_measures
from eg3d_rlhf.metrics.statistics import paired_summary, wilson_interval
from eg3d_rlhf.reports.shape_view import shade
from eg3d_rlhf.reward.reward import Reward
from eg3d_rlhf.rlhf.early_stop import EarlyStop
from eg3d_rlhf.rlhf.watch import Watch, annotator_calibration, utilities
from eg3d_rlhf.seeds import GEOMETRY, IMAGES, JUDGE
from eg3d_rlhf.settings import control_differs
from eg3d_rlhf.sigma.mesh import extract_mesh
from eg3d_rlhf.sigma.mesh_export import save_mesh
from eg3d_rlhf.sigma.spec import SlabSpec
from training import storage
from training.gan import save_grid
from training.networks import state_hash

FAKES = 1600  # images per Fréchet distance
SHOWN, MESHES = 8, 3  # latents in the pictures, and those with meshes
RESOLUTION = 128  # grid points per edge of the cube that pictures and meshes come from


@dataclass
class Evaluation:
    """What is known before a run of its end."""

    settings: dict  # as its folder records them
    before: Generator  # frozen, before tuning
    reward: Reward
    watch: Watch | None = None
    early_stop: EarlyStop | None = None  # chose what is evaluated; None: the last networks are


def reward_shift(c: Comparison) -> dict:
    """Rewards of the same latents before and after."""
    before, tuned = (c.scores(generator, c.seeds()).numpy() for generator in (c.before, c.after))
    delta = tuned - before
    return {
        "reward_before": {"mean": float(before.mean()), "std": float(before.std())},
        "reward_after": {"mean": float(tuned.mean()), "std": float(tuned.std())},
        "reward_delta_positive": int((delta > 0).sum()), "reward_delta_n": len(delta), "tuned_delta_mean": float(delta.mean()),
        "reward_deltas": delta.tolist(),
    }


def blind_pairs(c: Comparison) -> dict:
    """Share of held-out latents whose tuned shape the noise-free judge prefers; an exact tie counts half."""
    calibration, pair = annotator_calibration(), (c.before, c.after)
    before, tuned = (utilities(generator.generator.module, c.ws(generator, JUDGE.all), calibration) for generator in pair)
    wins, ties = int((tuned > before).sum()), int((tuned == before).sum())
    low, high = wilson_interval(wins + ties // 2, len(before))
    return {
        "win_rate": (wins + 0.5 * ties) / len(before), "win_rate_ci95": [low, high], "win_rate_n": len(before), "win_rate_ties": ties,
        "utility_before": float(before.mean()), "utility_after": float(tuned.mean()),
    }


def frechet(c: Comparison) -> dict:
    """Fréchet distance to the data before and after."""
    features, dataset = load_features(c.inception, c.device), open_data(c)
    real = FeatureStatistics(features.dim)
    for images in real_batches(dataset, 64):
        real.update(features(images.to(c.device)))
    chosen, cameras = np.random.RandomState(IMAGES.first).randint(len(dataset), size=FAKES), dataset.get_labels()
    fakes = FeatureStatistics(features.dim), FeatureStatistics(features.dim)
    with tqdm(total=2 * FAKES, desc="images for the Fréchet distance", unit="image") as bar:
        for generator, fake in zip((c.before, c.after), fakes, strict=True):
            for images in images_of(c, generator, cameras, IMAGES.take(FAKES), chosen):
                fake.update(features(images))
                bar.update(len(images))
    before, tuned = (fake.distance(real) for fake in fakes)
    return {
        "frechet_before": before, "frechet_after": tuned, "frechet_ratio": tuned / before, "frechet_features": features.name,
        "frechet_images": FAKES,
    }


def geometry(c: Comparison) -> dict:
    """Measures that the annotator never used; lower is better. 'better' compares means, with the paired interval beside it."""
    values: dict[str, list[np.ndarray]] = {}
    with tqdm(total=(4 if c.synthetic else 2) * GEOMETRY.count, desc="independent geometry measures", unit="shape") as bar:
        for generator in (c.before, c.after):
            found = view_measures(c, generator, GEOMETRY.all, bar.update)
            measures = {
                "photometric reprojection error": found.photometric, "depth disagreement": found.depth,
                "normal disagreement (degrees)": found.normal,
            }
            if c.synthetic:
                fitted = nearest_head_measures(generator.generator, c.ws(generator, GEOMETRY.all), on_batch=bar.update)
                measures["distance to the nearest head"] = fitted.distance
            for name, value in measures.items():
                values.setdefault(name, []).append(value)
    return {"geometry_n": GEOMETRY.count, "geometry": [
        {"name": name, "before": float(before.mean()), "after": float(tuned.mean()), "better": bool(tuned.mean() <= before.mean()),
         "paired": paired_summary(before, tuned)._asdict()} for name, (before, tuned) in values.items()
    ]}


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


def summarise(c: Comparison, e: Evaluation) -> dict:
    """All figures of a run, as JSON values, but the time that it took."""
    s, seeds = e.settings, c.seeds()
    record = reward_shift(c)
    record |= control_figures(s, record["tuned_delta_mean"])
    if c.synthetic:
        record |= blind_pairs(c) | frechet(c)
    record |= {**geometry(c), "reward_test_accuracy": None}
    clean = e.reward.provenance.get("test_accuracy_clean")  # against the noise-free order, where the labels held one
    if (found := clean or e.reward.provenance.get("test_accuracy")) is not None:
        record |= {"reward_test_accuracy": found["accuracy"], "reward_test_accuracy_ci95": found["interval_95"],
                   "reward_test_n": found["n"], "reward_test_against": "noise-free order" if clean else "labels"}
    return record | {
        "over_optimisation": e.watch.alarms if e.watch is not None else [], "seed": s["seed"],
        "device": str(c.device), "versions": versions(), "lambda_r": s["lambda_r"], "lambda_sigma": s["lambda_sigma"],
        "seeds": {"reward": [seeds[0], seeds[-1]], "judge": [JUDGE.all[0], JUDGE.all[-1]], "psi": c.psi},
    }


def finish(e: Evaluation, loop, started: float) -> dict:
    """Evaluate the finished loop and write summary.json, pictures and meshes into its folder; prints the table."""
    print("Comparing before and after on held-out latents (about a minute on 2 cores).", flush=True)
    folder, nets, early = loop.files.folder, loop.subject.nets, e.early_stop
    nets = nets if early is None else early.networks(nets)
    before, after = (LoadedGenerator(g, state_hash(g.module), folder, nets) for g in (e.before, of(nets.G_ema)))
    c = Comparison(before=before, after=after, reward=e.reward, run=folder, data=e.settings["data"], mirror=e.settings["mirror"],
                   device=next(nets.G_ema.parameters()).device)
    record = {**summarise(c, e), "images": loop.cur_nimg, "early_stop": None if early is None else early.record()}
    record["seconds"] = time.time() - started
    storage.write_atomic(folder / "summary.json", json.dumps(record, indent=2, sort_keys=True).encode())
    write_pictures(c, folder)
    lines = [("what", "figure", "goal"), *rows(record)]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    print("\n" + "\n".join(f"{what:<{widths[0]}}  {figure:<{widths[1]}}  {goal}" for what, figure, goal in lines))
    print(f"\nWritten to {folder}: summary.json, shapes.png, images.png (top row before, bottom row after), meshes/*.ply")
    return record


def rows(record: dict) -> list[tuple[str, str, str]]:
    """(what, figure, goal) lines of the table."""
    spreads = [f"{found['mean']:.3f} ± {found['std']:.3f}" for found in (record["reward_before"], record["reward_after"])]
    positive = f"{record['reward_delta_positive']}/{record['reward_delta_n']}, mean {record['tuned_delta_mean']:+.3f}"
    out = [("reward before / after (mean ± std)", " -> ".join(spreads), ""), ("positive reward deltas", positive, ">= 95/100")]
    if record.get("control_delta_mean") is not None:
        share = abs(record["control_delta_mean"]) / max(abs(record["tuned_delta_mean"]), 1e-12)
        text = f"{record['control_delta_mean']:+.3f} ({share:.1%} of the tuned shift; {record['control_source']})"
        out.append(("mean delta of the lambda_r = 0 control", text, "<= 10 %"))
    elif record.get("control_source"):
        out.append(("mean delta of the lambda_r = 0 control", f"none: {record['control_source']}", "<= 10 %"))
    if "win_rate" in record:
        low, high = record["win_rate_ci95"]
        text = f"{record['win_rate']:.1%} of {record['win_rate_n']} [{low:.1%}, {high:.1%}]"
        out.append(("judge prefers the tuned shape (95 % interval)", text, ">= 74.4 %, aim 95 %"))
        ratio = record["frechet_after"] / record["frechet_before"]
        out.append(("Fréchet distance before -> after", f"{record['frechet_before']:.3f} -> {record['frechet_after']:.3f} (x{ratio:.3f})",
                    "<= x1.63, aim x1.10"))
    for row in record["geometry"]:
        verdict = "not worse" if row["better"] else "WORSE"
        out.append((row["name"], f"{row['before']:.4g} -> {row['after']:.4g} ({verdict})", "not worse"))
    if record.get("reward_test_accuracy") is not None:
        low, high = record["reward_test_accuracy_ci95"]
        text = f"{record['reward_test_accuracy']:.3f} [{low:.3f}, {high:.3f}] of {record['reward_test_n']}"
        out.append((f"reward's test accuracy against the {record['reward_test_against']}", text, ">= 0.85"))
    fallen = sorted({name for alarm in record["over_optimisation"] for name in alarm["fallen"]})
    out.append(("over-optimisation watch", f"ALARM: {', '.join(fallen)} fell while the reward rose" if fallen else "quiet", "quiet"))
    if (kept := record.get("early_stop")) is not None:
        text = f"after {kept['images']} of {kept['of']} images: second reward {kept['second']:+.3f}, distance {kept['distance']:.3f}"
        out.append(("early stop kept the snapshot", text, ""))
    out.append(("time", f"{record['seconds']:.0f} s on {record['device']}", "<= 720 s"))
    return out


@torch.no_grad()
def write_pictures(c: Comparison, folder: Path) -> None:
    """shapes.png and images.png, before above after for the same latents, and meshes of the first of them."""
    shapes, images, seeds = [], [], JUDGE.take(SHOWN)
    (folder / "meshes").mkdir(parents=True, exist_ok=True)
    for name, loaded in c.generators().items():
        field = loaded.generator.field(c.ws(loaded, seeds))
        spec = SlabSpec.of(field.bounds, RESOLUTION)
        sigma = field.density_grid(spec)
        shapes += [shade(sigma, yaw, level=field.level) for yaw in (0.0, 0.5)]
        images.append(image_from(loaded, field, 0.3, 0).cpu())
        for seed, cube in list(zip(seeds, sigma.cpu(), strict=True))[:MESHES]:
            try:
                save_mesh(folder / "meshes" / f"seed{seed}-{name}.ply", *extract_mesh(cube, spec, field.level))
            except ValueError as error:  # a sample without a surface: say so, keep the rest
                print(f"No mesh for seed {seed} ({name}): {error}")
    save_grid(torch.cat(shapes), (0, 1), SHOWN, folder / "shapes.png")
    save_grid(torch.cat(images), (-1, 1), SHOWN, folder / "images.png")
