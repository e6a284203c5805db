"""What judges a reward run at its end, before against after on held-out latents: the annotator without noise, distances to the data, and
measures of geometry that share nothing with the annotator.

Every change gets a verdict from its 95 % interval. Letters: N latents, K true heads.
"""

from operator import attrgetter

import numpy as np
import torch

from eg3d_rlhf.core.field import Bounds, Field
from eg3d_rlhf.core.seeds import GEOMETRY, IMAGES, JUDGE, SHAPES
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import paired_summary, wilson_interval
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.geometry import view_measures
from eg3d_rlhf.evaluation.images import images_of, open_data
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.measures import shape_critic
from eg3d_rlhf.measures.distances import FeatureStatistics, collect
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.image_metrics import real_batches
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.measures.resampling import frechet_change_interval
from eg3d_rlhf.measures.shape_critic import maps_of
from eg3d_rlhf.measures.surface import ALIKE, Relief, relief
from eg3d_rlhf.measures.true_heads import RAMPS, head_distances, nearest_head_measures, ramped, true_shapes
from eg3d_rlhf.preferences.annotator import Calibration, utility
from eg3d_rlhf.tuning.gan.watch import JUDGE_RESOLUTION, annotator_calibration, utilities
from training.progress import tqdm

FAKES = 1600  # images per Fréchet distance
TRUE_HEADS = 32  # whose utility says how far there is to go
RESAMPLES = 60  # of a Fréchet distance's change
BOOTSTRAP = 10_000
FITTED = 20  # heads fitted together
RELIEF_RESOLUTION = 64  # grid points per edge of the cube that relief is read from


VIEWS = (  # of MultiViewMeasures
    Measure("photometric reprojection error", attrgetter("photometric"), "lower", "L1 of 0..2"),
    Measure("depth disagreement", attrgetter("depth"), "lower", "share of the camera distance"),
    Measure("normal disagreement (degrees)", attrgetter("normal"), "lower", "degrees"),
)
NEAREST = Measure("distance to the nearest head", attrgetter("distance"), "lower", "world units")
CRITIC = Measure("shape critic", None, "higher", "logit that the shape is a true head")
SHAPE_FRECHET = Measure("shape Fréchet", None, "lower", "squared distance of normal maps' features")
FRECHET = Measure("Fréchet", None, "lower", "squared distance of images' features")


def measured(measure: Measure, before: float, after: float, change: dict) -> dict:
    """A line of `geometry` of the summary; `change` holds at least mean, mean_lo and mean_hi of after - before."""
    upwards = measure.better == "higher"
    better = after >= before if upwards else after <= before
    return {"name": measure.name, "before": float(before), "after": float(after), "better": bool(better), "higher_is_better": upwards,
            "paired": change, "verdict": measure.verdict(change["mean_lo"], change["mean_hi"])}


def true_utilities(c: Comparison, calibration: Calibration) -> np.ndarray:
    """Noise-free utilities [K] of true heads, each the mean over RAMPS, by the path that a generator's shapes take."""
    spec, level = SlabSpec.of(c.before.generator.bounds, JUDGE_RESOLUTION), c.before.generator.level
    values = [
        [utility(ramped(distance, ramp, level).numpy(), calibration=calibration, box_warp=spec.box_warp).total for ramp in RAMPS]
        for shape in true_shapes(TRUE_HEADS).split(1) for distance in head_distances(shape, spec)
    ]
    return np.mean(values, axis=1)


def gap_closed(before: np.ndarray, after: np.ndarray, true: np.ndarray, seed: int = 0) -> tuple[float | None, list[float] | None]:
    """Share (after - before) / (true - before) of the way to true heads, and its 95 % percentile bootstrap interval over latents and heads.

    Args: before, after: [N], the same latents; true: [K]. None where true heads are no better, or may be no better, than `before`.
    """
    if true.mean() <= before.mean():
        return None, None
    rng = np.random.default_rng(seed)
    latents, heads = (rng.integers(0, len(values), (BOOTSTRAP, len(values))) for values in (before, true))
    gained, gap = (after - before)[latents].mean(axis=1), true[heads].mean(axis=1) - before[latents].mean(axis=1)  # [B] each
    ends = np.quantile(gained / gap, [0.025, 0.975]).tolist() if gap.min() > 0 else None
    return float((after.mean() - before.mean()) / (true.mean() - before.mean())), ends


def blind_pairs(c: Comparison) -> dict:
    """Share of held-out latents whose tuned shape the noise-free judge prefers, an exact tie counts half; how far it is to true heads."""
    calibration, pair = annotator_calibration(), (c.before, c.after)
    before, tuned = (utilities(generator.generator, c.ws(generator, JUDGE.all), calibration) for generator in pair)
    wins, ties = int((tuned > before).sum()), int((tuned == before).sum())
    low, high = wilson_interval(wins + ties // 2, len(before))
    true = true_utilities(c, calibration)
    closed, ends = gap_closed(before, tuned, true)
    return {
        "win_rate": (wins + 0.5 * ties) / len(before), "win_rate_ci95": [low, high], "win_rate_n": len(before), "win_rate_ties": ties,
        "utility_before": float(before.mean()), "utility_after": float(tuned.mean()), "utility_true": float(true.mean()),
        "utility_true_std": float(true.std()), "utility_true_n": len(true), "utility_true_ramps": list(RAMPS),
        "gap_closed": closed, "gap_closed_ci95": ends,
    }


def frechet(c: Comparison) -> dict:
    """Fréchet distance to the data before and after."""
    network, dataset = load_features(c.inception, c.device), open_data(c)
    real, real_features = collect(network, (images.to(c.device) for images in real_batches(dataset, 64)))
    chosen, cameras = np.random.RandomState(IMAGES.first).randint(len(dataset), size=FAKES), dataset.get_labels()
    with tqdm(total=2 * FAKES, desc="images for the Fréchet distance", unit="image") as bar:
        fakes = [collect(network, images_of(c, generator, cameras, IMAGES.take(FAKES), chosen), bar.update)
                 for generator in (c.before, c.after)]
    before, tuned = (statistics.distance(real) for statistics, _ in fakes)
    record = {
        "frechet_before": before, "frechet_after": tuned, "frechet_ratio": tuned / before, "frechet_features": network.name,
        "frechet_images": FAKES,
    }
    if min(FAKES, len(real_features)) > network.dim:  # an Inception's 2048 features ask for more images
        found = frechet_change_interval(fakes[0][1], fakes[1][1], real_features, RESAMPLES)
        record |= {"frechet_change_ci95": [found.lo, found.hi], "frechet_verdict": FRECHET.verdict(found.lo, found.hi)}
    return record


def geometry(c: Comparison) -> dict:
    """Measures that the annotator never used; 'better' compares means, the verdict is that of the paired interval beside it."""
    values: dict[Measure, list[np.ndarray]] = {}
    with tqdm(total=(4 if c.synthetic else 2) * GEOMETRY.count, desc="independent geometry measures", unit="shape") as bar:
        for generator in (c.before, c.after):
            views = view_measures(c, generator, GEOMETRY.all, bar.update)
            found = {measure: measure.values(views) for measure in VIEWS}
            if c.synthetic:
                fitted = nearest_head_measures(generator.generator, c.ws(generator, GEOMETRY.all), batch=FITTED, on_batch=bar.update)
                found[NEAREST] = NEAREST.values(fitted)
            for measure, value in found.items():
                values.setdefault(measure, []).append(value)
    rows = [measured(measure, old.mean(), new.mean(), paired_summary(old, new)._asdict()) for measure, (old, new) in values.items()]
    return {"geometry_n": GEOMETRY.count, "geometry": rows}


def shapes(c: Comparison) -> dict:
    """The shape critic's logits and the Fréchet distance of shapes to true heads, both of normal maps; where there is no critic, why."""
    path, bounds = shape_critic.DEFAULT_ASSET, c.before.generator.bounds
    if not path.is_file() or bounds != Bounds():
        why = f"no {path.name}; run eg3d-rlhf assets critic" if bounds == Bounds() else f"it knows the unit cube alone, not {bounds}"
        return {"critic": None, "critic_missing": why, "geometry": []}
    critic, logits, features = shape_critic.ShapeCritic.load(path).to(c.device), [], []
    with tqdm(total=2 * SHAPES.count, desc="normal maps for the shape critic", unit="shape") as bar:
        for generator in (c.before, c.after):
            found = []
            for field in c.fields(generator, SHAPES.all, psi=1.0):
                maps = maps_of(field)
                found.append((critic.logits(maps).cpu(), critic.features(maps).cpu()))
                bar.update(len(maps))
            both = [torch.cat(parts).double().numpy() for parts in zip(*found, strict=True)]
            logits.append(both[0])
            features.append(both[1])
    true, dim = critic.true.double().numpy(), critic.true.shape[1]
    distances = [FeatureStatistics(dim).update(part).distance(FeatureStatistics(dim).update(true)) for part in features]
    change = frechet_change_interval(features[0], features[1], true, RESAMPLES)
    paired = {"mean": change.mean, "mean_lo": change.lo, "mean_hi": change.hi, "confidence": 0.95, "n": SHAPES.count, "n_true": len(true)}
    learnt = [fake["hash"] for fake in critic.record["fakes"]]
    return {"critic": learnt, "critic_knew_before": c.before.hash in learnt, "shapes_n": SHAPES.count, "shapes_psi": 1.0, "geometry": [
        measured(CRITIC, logits[0].mean(), logits[1].mean(), paired_summary(logits[0], logits[1])._asdict()),
        measured(SHAPE_FRECHET, distances[0], distances[1], paired),
    ]}


def critic_logits(field: Field) -> torch.Tensor:
    """The shape critic's logit [N] that each shape of a field in the unit cube is a true head; higher is better."""
    critic = shape_critic.ShapeCritic.load()
    return critic.logits(maps_of(field)).double()


@torch.no_grad()
def reliefs(c: Comparison, generator: LoadedGenerator) -> Relief:
    """Correlations of the frontal relief of the comparison's latents with their nearest true heads', which are fitted together: 5 times as
    fast as eight by eight."""
    spec = SlabSpec.of(generator.generator.bounds, RELIEF_RESOLUTION)
    return relief(torch.cat([field.density_grid(spec) for field in c.fields(generator, c.seeds())]), spec, generator.generator.level)


def relief_shares(c: Comparison) -> dict:
    """Share of latents whose face has the relief of the nearest true head, before and after."""
    print("Fitting true heads to the faces of both (half a minute).", flush=True)
    before, tuned = (reliefs(c, generator) for generator in (c.before, c.after))
    record: dict = {"relief_n": len(c.seeds()), "relief_least": ALIKE, "relief_share": float((tuned.plane >= ALIKE).mean())}
    for name, found in (("before", before), ("after", tuned)):
        record |= {f"relief_share_{name}": float((found.plane >= ALIKE).mean()), f"relief_mean_{name}": float(found.plane.mean()),
                   f"relief_detail_share_{name}": float((found.detail >= ALIKE).mean()),
                   f"relief_detail_mean_{name}": float(found.detail.mean())}
    return record
