"""What judges a reward run at its end, before against after on held-out latents: the annotator without noise, distances to the data, and
measures of geometry that share nothing with the annotator.

Every change gets a verdict from its 95 % interval. Letters: N latents, K true heads.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import ASSETS, file_hash
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
from eg3d_rlhf.preferences.annotator import utility
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.tuning.gan.watch import JUDGE_RESOLUTION, annotator_calibration, utilities
from torch_utils import build
from training import storage
from training.synthetic_heads import resolve_dataset

FAKES = 1600  # images per Fréchet distance
TRUE_HEADS = 32  # whose utility says how far there is to go
RESAMPLES = 60  # of a Fréchet distance's change
BOOTSTRAP = 10_000
FITTED = 20  # heads fitted together
RELIEF_RESOLUTION = 64  # grid points per edge of the cube that relief is read from
REALS_AT_ONCE = 64  # images of the data that the features' network reads
ROLES = ("before", "after")

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


# What is seen of one network: arrays, from which the figures follow. Each is computed once, wherever it is asked for (`seen`).

Seen = dict[str, np.ndarray]


@torch.no_grad()
def _utilities(c: Comparison, generator: LoadedGenerator) -> Seen:
    return {"utility": utilities(generator.generator, c.ws(generator, JUDGE.all), annotator_calibration())}


def _true_utilities(c: Comparison, generator: LoadedGenerator) -> Seen:
    """Noise-free utilities [K] of true heads, each the mean over RAMPS, by the path that a generator's shapes take."""
    spec, level, calibration = SlabSpec.of(generator.generator.bounds, JUDGE_RESOLUTION), generator.generator.level, annotator_calibration()
    values = [
        [utility(ramped(distance, ramp, level).numpy(), calibration=calibration, box_warp=spec.box_warp).total for ramp in RAMPS]
        for shape in true_shapes(TRUE_HEADS).split(1) for distance in head_distances(shape, spec)
    ]
    return {"utility": np.mean(values, axis=1)}


def _images(c: Comparison, generator: LoadedGenerator) -> Seen:
    network, dataset = load_features(c.inception, c.device), open_data(c)
    chosen, cameras = np.random.RandomState(IMAGES.first).randint(len(dataset), size=FAKES), dataset.get_labels()
    return {"features": collect(network, images_of(c, generator, cameras, IMAGES.take(FAKES), chosen))[1]}


def _data(c: Comparison, _generator: LoadedGenerator) -> Seen:
    network = load_features(c.inception, c.device)
    return {"features": collect(network, (images.to(c.device) for images in real_batches(open_data(c), REALS_AT_ONCE)))[1]}


@torch.no_grad()
def _relief(c: Comparison, generator: LoadedGenerator) -> Seen:
    """Correlations of the frontal relief of the comparison's latents with their nearest true heads', which are fitted together: 5 times as
    fast as eight by eight."""
    spec = SlabSpec.of(generator.generator.bounds, RELIEF_RESOLUTION)
    cubes = torch.cat([field.density_grid(spec) for field in c.fields(generator, c.seeds())])
    return relief(cubes, spec, generator.generator.level)._asdict()


def _views(c: Comparison, generator: LoadedGenerator) -> Seen:
    views = view_measures(c, generator, GEOMETRY.all)
    return {measure.name: measure.values(views) for measure in VIEWS}


def _nearest_heads(c: Comparison, generator: LoadedGenerator) -> Seen:
    fitted = nearest_head_measures(generator.generator, c.ws(generator, GEOMETRY.all), batch=FITTED)
    return {NEAREST.name: NEAREST.values(fitted)}


@torch.no_grad()
def _normal_maps(c: Comparison, generator: LoadedGenerator) -> Seen:
    """The shape critic's logits and features of normal maps."""
    critic, parts = shape_critic.ShapeCritic.load(shape_critic.DEFAULT_ASSET).to(c.device), []
    for field in c.fields(generator, SHAPES.all, psi=1.0):
        maps = maps_of(field)
        parts.append((critic.logits(maps).cpu(), critic.features(maps).cpu()))
    logits, features = (torch.cat(both).double().numpy() for both in zip(*parts, strict=True))
    return {"logits": logits, "features": features}


PARTS: dict[str, Callable[[Comparison, LoadedGenerator], Seen]] = {  # those that take longest first
    "images": _images, "normal maps": _normal_maps, "data": _data, "nearest heads": _nearest_heads, "utilities": _utilities,
    "relief": _relief, "views": _views, "true heads": _true_utilities,
}
_OF_TRUE_FAMILY = ("images", "data", "nearest heads", "utilities", "relief", "true heads")
_OF_NO_NETWORK = ("data", "true heads")


def parts_of(c: Comparison) -> list[tuple[str, str]]:
    """(part, network's role) of everything that the judges of a comparison see."""
    missing = {*(() if c.synthetic else _OF_TRUE_FAMILY), *(("normal maps",) if no_critic(c) else ())}
    return [(part, role) for part in PARTS if part not in missing for role in ("before", *(() if part in _OF_NO_NETWORK else ("after",)))]


def seen(c: Comparison, part: str, role: str = "before") -> Seen:
    """What a part sees of the network before or after tuning; kept in the comparison, and of the bundled network on the disk."""
    case = ("judges", part, role)
    if case not in c.memory:
        path = _cache_path(c, part) if role == "before" else None
        found = None if path is None else _read(path)
        if found is None:
            found = PARTS[part](c, c.generators()[role])
            if path is not None:
                storage.write_atomic(path, safetensors.numpy.save(found))
        c.memory[case] = found
    return c.memory[case]


def _cache_path(c: Comparison, part: str) -> Path | None:
    """A file in the user's cache, named by all that the part depends on; None for networks and data that are not the bundled ones."""
    if c.before.hash != _bundled_hash() or c.data != "synthetic:heads64" or c.inception is not None or c.device.type != "cpu":
        return None
    settings = [part, c.before.hash, c.n, c.seed, c.psi, c.batch, c.mirror, file_hash(resolve_dataset(c.data)), _sources()]
    numerics = [torch.__version__, np.__version__, torch.backends.cpu.get_cpu_capability(), build.available("triplane_decode", "cpu")]
    name = hashlib.sha256(json.dumps([*settings, *numerics]).encode()).hexdigest()[:16]
    return build.cache_dir().parent / "judges" / f"{part.replace(' ', '-')}-{name}.safetensors"


@functools.cache
def _bundled_hash() -> str:
    return load_reward(bundled.REWARD).provenance["generator"]


@functools.cache
def _sources() -> str:
    """Hash of our code and assets: whatever changes in them may change a value."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(path for room in ("eg3d_rlhf", "training", "torch_utils") for path in (root / room).rglob("*.*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(path.read_bytes())
    for path in sorted(ASSETS.glob("*.safetensors")):
        digest.update(file_hash(path).encode())
    return digest.hexdigest()


def _read(path: Path) -> Seen | None:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None


# Figures of before against after.


def _statistics(features: np.ndarray, batch: int) -> FeatureStatistics:
    """Of features in the batches in which they were made, so that rounding does not depend on who made them."""
    found = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), batch):
        found.update(features[start : start + batch])
    return found


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
    before, tuned = (seen(c, "utilities", role)["utility"] for role in ROLES)
    wins, ties = int((tuned > before).sum()), int((tuned == before).sum())
    low, high = wilson_interval(wins + ties // 2, len(before))
    true = seen(c, "true heads")["utility"]
    closed, ends = gap_closed(before, tuned, true)
    return {
        "win_rate": (wins + 0.5 * ties) / len(before), "win_rate_ci95": [low, high], "win_rate_n": len(before), "win_rate_ties": ties,
        "utility_before": float(before.mean()), "utility_after": float(tuned.mean()), "utility_true": float(true.mean()),
        "utility_true_std": float(true.std()), "utility_true_n": len(true), "utility_true_ramps": list(RAMPS),
        "gap_closed": closed, "gap_closed_ci95": ends,
    }


def frechet(c: Comparison) -> dict:
    network, real = load_features(c.inception, c.device), seen(c, "data")["features"]
    fakes = [seen(c, "images", role)["features"] for role in ROLES]
    of_data = _statistics(real, REALS_AT_ONCE)
    before, tuned = (_statistics(features, c.batch).distance(of_data) for features in fakes)
    record = {
        "frechet_before": before, "frechet_after": tuned, "frechet_ratio": tuned / before, "frechet_features": network.name,
        "frechet_images": FAKES,
    }
    if min(FAKES, len(real)) > network.dim:  # an Inception's 2048 features ask for more images
        found = frechet_change_interval(fakes[0], fakes[1], real, RESAMPLES)
        record |= {"frechet_change_ci95": [found.lo, found.hi], "frechet_verdict": FRECHET.verdict(found.lo, found.hi)}
    return record


def geometry(c: Comparison) -> dict:
    """Measures that the annotator never used; 'better' compares means, the verdict is that of the paired interval beside it."""
    table = [(measure, "views") for measure in VIEWS] + ([(NEAREST, "nearest heads")] if c.synthetic else [])
    rows = []
    for measure, part in table:
        old, new = (seen(c, part, role)[measure.name] for role in ROLES)
        rows.append(measured(measure, old.mean(), new.mean(), paired_summary(old, new)._asdict()))
    return {"geometry_n": GEOMETRY.count, "geometry": rows}


def shapes(c: Comparison) -> dict:
    """The shape critic's logits and the Fréchet distance of shapes to true heads, both of normal maps; where there is no critic, why."""
    if why := no_critic(c):
        return {"critic": None, "critic_missing": why, "geometry": []}
    critic, both = shape_critic.ShapeCritic.load(shape_critic.DEFAULT_ASSET), [seen(c, "normal maps", role) for role in ROLES]
    logits, features = ([found[name] for found in both] for name in ("logits", "features"))
    true, dim = critic.true.double().numpy(), critic.true.shape[1]
    distances = [FeatureStatistics(dim).update(part).distance(FeatureStatistics(dim).update(true)) for part in features]
    change = frechet_change_interval(features[0], features[1], true, RESAMPLES)
    paired = {"mean": change.mean, "mean_lo": change.lo, "mean_hi": change.hi, "confidence": 0.95, "n": SHAPES.count, "n_true": len(true)}
    learnt = [fake["hash"] for fake in critic.record["fakes"]]
    return {"critic": learnt, "critic_knew_before": c.before.hash in learnt, "shapes_n": SHAPES.count, "shapes_psi": 1.0, "geometry": [
        measured(CRITIC, logits[0].mean(), logits[1].mean(), paired_summary(logits[0], logits[1])._asdict()),
        measured(SHAPE_FRECHET, distances[0], distances[1], paired),
    ]}


def no_critic(c: Comparison) -> str:
    """Why there is no shape critic for these networks; '' where there is one."""
    path, bounds = shape_critic.DEFAULT_ASSET, c.before.generator.bounds
    if bounds != Bounds():
        return f"it knows the unit cube alone, not {bounds}"
    return "" if path.is_file() else f"no {path.name}; run eg3d-rlhf assets critic"


def critic_logits(field: Field) -> torch.Tensor:
    """The shape critic's logit [N] that each shape of a field in the unit cube is a true head; higher is better."""
    critic = shape_critic.ShapeCritic.load()
    return critic.logits(maps_of(field)).double()


def relief_shares(c: Comparison) -> dict:
    """Share of latents whose face has the relief of the nearest true head, before and after."""
    before, tuned = (Relief(**seen(c, "relief", role)) for role in ROLES)
    record: dict = {"relief_n": len(c.seeds()), "relief_least": ALIKE, "relief_share": float((tuned.plane >= ALIKE).mean())}
    for name, found in (("before", before), ("after", tuned)):
        record |= {f"relief_share_{name}": float((found.plane >= ALIKE).mean()), f"relief_mean_{name}": float(found.plane.mean()),
                   f"relief_detail_share_{name}": float((found.detail >= ALIKE).mean()),
                   f"relief_detail_mean_{name}": float(found.detail.mean())}
    return record
