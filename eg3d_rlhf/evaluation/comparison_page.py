"""Evaluation report: its parts, the summary of what the figures support and what they do not, and renders of
shapes.

Letters: N latents, D, H, W grid points, R pixels per edge.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.cli import some_of
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import geometry, images, rewards
from eg3d_rlhf.evaluation.comparison import Comparison, settings_of
from eg3d_rlhf.evaluation.paired import NO_CONTROL, ROLES
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.experiments.pages import Finding, Job
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.image_similarity import load_identity, load_lpips
from eg3d_rlhf.tuning.gan.settings import control_differs
from training.gan import save_grid

TITLE = "Before and after tuning"


def select(comparison: Comparison, keys: str | None = None) -> list[Job]:
    """Select the report's parts, all or those of a comma-separated list of keys.

    Raises: ValueError for an unknown key.
    """
    parts = (rewards.jobs, images.jobs, geometry.jobs, rewards.curve_jobs, geometry.depth_jobs, strip_jobs)
    jobs = [job for part in parts for job in part(comparison)]
    # The page keeps its own order, whatever the order of the list.
    wanted = None if keys is None else some_of("--only", keys, [job.key for job in jobs])
    return [job for job in jobs if wanted is None or job.key in wanted]


def check_files(comparison: Comparison) -> None:
    """Open the networks that the user names, before minutes of work depend on them. Raises: ValueError."""
    if comparison.inception is not None:
        load_features(comparison.inception, comparison.device)
    if comparison.lpips is not None:
        load_lpips(comparison.lpips, comparison.device)
    if comparison.identity is not None:
        load_identity(comparison.identity, comparison.device)


def introduction(comparison: Comparison) -> str:
    """Describe the networks at the top of the page."""
    # role -> the run's folder
    run_names = {
        role: f" of {run.name}"
        for role, run in (("after", comparison.run), ("control", comparison.control_run))
        if run is not None
    }
    named = [
        f"{role} {generator.path.name}{run_names.get(role, '')}"
        for role, generator in comparison.generators().items()
    ]
    return (
        "The same held-out latents through each generator:"
        f" {', '.join(named)}{'; no control' if comparison.control is None else ''}. Every figure states its latents,"
        " networks and interval; its data can be downloaded below it."
    )


def summary(comparison: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    """List what the numbers support, then what they do not support."""
    return [f"Allowed: {text}" for text in _allowed(findings)] + [
        f"Not allowed: {text}" for text in _not_allowed(comparison, findings)
    ]


def _allowed(findings: Mapping[str, Finding]) -> list[str]:
    """List the statements that the intervals support."""
    sentences = []
    data = {key: finding.data for key, finding in findings.items()}
    paired = data.get("reward-shift", {}).get("paired", {})
    # Only intervals that exclude "no change" support a statement.
    if paired and paired["after"]["mean_lo"] > 0:
        # A control that hardly moved means that further training alone is not the cause.
        control_unchanged = (
            "control" in paired and abs(paired["control"]["mean"]) < 0.1 * paired["after"]["mean"]
        )
        cause = (
            "; the control moved by less than a tenth of that, so the reward phase is the cause"
            if control_unchanged
            else ""
        )
        sentences.append(f"the optimised reward rose, by {paired['after']['mean']:.2f} on average{cause}.")
    for name, curve in data.get("over-optimisation", {}).get("curves", {}).items():
        # The optimised reward itself is reported above.
        if name != rewards.PROXY and curve["steps"][-1]["lo"] > 0:
            end = (
                "though it has passed its peak"
                if curve["divergence"] is not None
                else "without a point of divergence"
            )
            part = (
                "from which the labels were sampled with noise"
                if name == rewards.ORACLE
                else "which was not used in tuning"
            )
            sentences.append(
                f"the {name}, {part}, rose too ({curve['steps'][-1]['mean']:+.2f} standard deviations),"
                f" {end}."
            )
    for change in data.get("image-distances", {}).get("changes", []):
        if change["role"] == "after" and not change["lo"] <= 0 <= change["hi"]:
            sentences.append(
                f"images moved {'away from' if change['lo'] > 0 else 'towards'} the data"
                f" ({change['distance']} distance)."
            )
    for row in data.get("diversity", {}).get("rows", []):
        if row["role"] == "after" and (row["ratio_hi"] < 1 or row["ratio_lo"] > 1):
            kind = "less" if row["ratio_hi"] < 1 else "more"
            sentences.append(
                f"{row['of']} of different latents are {kind} diverse ({row['ratio']:.2f} times)."
            )
    return sentences or ["nothing: no selected part shows a change whose interval excludes zero change."]


def _not_allowed(comparison: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    """List the statements that the figures do not support."""
    sentences = [
        "that people prefer the tuned shapes: no person was asked here. Compare them blind.",
        (
            "any statement on other training seeds: there is one run for each setting, and intervals run over"
            " latents."
        ),
    ]
    if comparison.control is None:
        sentences.append("the cause of a change: without a control, further training alone may have made it.")
    elif (
        comparison.run
        and comparison.control_run
        and (other := control_differs(settings_of(comparison.run), settings_of(comparison.control_run)))
    ):
        sentences.append(
            f"a change that is due to the reward alone: the control also differs in {', '.join(other)}."
        )
    # Rewards from common labels share their errors.
    if (
        comparison.held_out is None
        or comparison.held_out.labels == comparison.reward.labels
        or comparison.held_out.labels & comparison.reward.labels
    ):
        sentences.append(
            "freedom from over-optimisation in general: "
            + (
                "there is no second reward."
                if comparison.held_out is None
                else "the second reward was trained on the same labels as the first."
            )
        )
    if comparison.synthetic:
        sentences.append(
            "anything on photographs of people: these are rendered heads, and the oracle is a formula."
        )
    missing = [key for key, finding in findings.items() if "absent" in finding.data]
    if missing:
        sentences.append(
            f"statements of these parts, which could not be computed (each gives its reason):"
            f" {', '.join(missing)}."
        )
    return sentences


# Renders of shapes: the best and worst by reward, the same latents before and after, and an orbit. Renders
# show the geometry only (shaded first crossings of sigma = 10), as annotators of geometry see it. None is
# selected by hand.

K = 5  # shapes in a strip of the best or the worst, as in the paper
SHOWN = 6  # latents in the before/after strip; their seeds were fixed before any result was known
# yaw in radians from frontal; the second pair is for heads of people, whose scans are damaged at the back of
# the head
YAWS = (0.0, 0.5)
BOTH_SIDES = (0.4, math.pi - 0.4)
# One swing from left to right and back; for heads of people up to the back of the head.
ORBIT_FRAMES = 16
ORBIT_YAW = 0.7
ORBIT_STILLS = 7  # still images of the orbit
# milliseconds per frame; swings until the animation stops, 4.5 s in all
FRAME_MS = 140
SWINGS = 2
# grid points per edge of the cube; pixels per edge of a render
RESOLUTION = 128
PIXELS = 128


def strip_jobs(comparison: Comparison) -> list[Job]:
    """Return the parts with renders."""
    shown = list(comparison.seeds(SHOWN, EVALUATION))
    # Inputs of the jobs: another size renders again.
    size: dict[str, Any] = {"resolution": RESOLUTION, "pixels": PIXELS, "yaws": yaws_of(comparison)}
    return [
        comparison.job(
            "reward-strips",
            "Best and worst shapes by reward",
            reward_strips,
            roles=("before", "after", "reward"),
            n=comparison.n,
            k=K,
            **size,
        ),
        comparison.job(
            "same-latents",
            "The same latents before and after",
            same_latents,
            roles=(*ROLES, "reward"),
            seeds=shown,
            **size,
        ),
        comparison.job("orbit", "Orbit", orbit, roles=("before", "after"), seeds=shown[:1], **size),
    ]


def yaws_of(comparison: Comparison) -> tuple[float, float]:
    """Return the two yaws from which shapes are rendered."""
    return BOTH_SIDES if comparison.of_people else YAWS


@torch.no_grad()
def shapes(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int], yaws: Sequence[float]
) -> torch.Tensor:
    """Render shaded shapes [N, yaws, 1, R, R] in 0..1; a latent without a surface is white."""
    spec = SlabSpec.of(generator.generator.bounds, RESOLUTION)
    parts = []
    # A quarter of the batch, since a density grid has RESOLUTION^3 points per shape.
    for field in comparison.fields(generator, seeds, batch=max(1, comparison.batch // 4)):
        sigma = field.density_grid(spec).cpu()
        parts.append(torch.stack([shade(sigma, yaw, PIXELS, field.level) for yaw in yaws], dim=1))
    return torch.cat(parts)


def reward_strips(comparison: Comparison, folder: Path) -> Finding:
    """Show two views of the K latents with the highest and the lowest reward, per network."""
    seeds = comparison.seeds()
    rows = []
    files_by_caption = {}
    # At most half: the strips of best and worst must not overlap.
    k = min(K, len(seeds) // 2)
    above, below = yaws_of(comparison)
    for role in ("before", "after"):
        generator = comparison.generators()[role]
        scores = comparison.scores(generator, seeds).double().numpy()
        # Stable, so that equal scores keep the order of the seeds.
        order = np.argsort(-scores, kind="stable")
        for which, chosen in (("highest", order[:k]), ("lowest", order[::-1][:k])):
            picked = [seeds[int(i)] for i in chosen]
            views = shapes(comparison, generator, picked, yaws_of(comparison))  # [k, 2, 1, R, R]
            name = f"reward-strips-{role}-{which}.png"
            # All shapes of the first yaw, then all of the second: two rows of k
            save_grid(views.transpose(0, 1).flatten(0, 1), (0, 1), k, folder / name)
            # Seeds are consecutive, so a seed's offset is its index.
            listed = ", ".join(f"{seed}: {scores[seed - seeds[0]]:.2f}" for seed in picked)
            files_by_caption[
                f"{role}, {which} reward from left to right ({listed}); yaw {above:+.1f} above, {below:+.1f}"
                " radians below"
            ] = name
            rows += [
                {
                    "role": role,
                    "which": which,
                    "rank": i + 1,
                    "seed": s,
                    "reward": float(scores[s - seeds[0]]),
                }
                for i, s in enumerate(picked)
            ]
    sentences = [
        (
            f"The {k} highest and {k} lowest of {len(seeds)} latents by the tuning reward, each network by"
            " itself. The difference between highest and lowest is what the reward measures. Check by eye"
            " whether the highest are better; a defect that they share is one that the reward does not"
            " penalise."
        ),
    ]
    return Finding(
        facts=comparison.facts(seeds, ("before", "after", "reward")),
        data={"k": k},
        rows=rows,
        says=sentences,
        images=files_by_caption,
    )


def same_latents(comparison: Comparison, folder: Path) -> Finding:
    """Show the same fixed latents under each generator."""
    seeds = list(comparison.seeds(SHOWN, EVALUATION))
    files_by_caption = {}
    # yaws: two views of each latent, [N, yaws, 1, R, R] per role
    views = {
        role: shapes(comparison, generator, seeds, yaws_of(comparison))
        for role, generator in comparison.generators().items()
    }
    scores = {
        f"reward_{role}": comparison.scores(generator, seeds).double().tolist()
        for role, generator in comparison.generators().items()
    }
    rows = [
        {"seed": seed, **dict(zip(scores, seed_scores, strict=True))}
        for seed, *seed_scores in zip(seeds, *scores.values(), strict=True)
    ]
    for j, yaw in enumerate(yaws_of(comparison)):
        name = f"same-latents-{j}.png"
        # One row per network
        save_grid(
            torch.cat([role_views[:, j] for role_views in views.values()]), (0, 1), len(seeds), folder / name
        )
        files_by_caption[
            f"Yaw {yaw:+.1f} radians; rows {', '.join(views)}; seeds {seeds[0]}..{seeds[-1]} from left to"
            " right"
        ] = name
    sentences = [
        (
            "The seeds were fixed before any result was known, so these are ordinary samples without"
            " selection. A few renders show what kind of change to expect; how often it happens is in the"
            " counted parts of this report."
        ),
        *([NO_CONTROL] if comparison.control is None else []),
    ]
    data = {"seeds": seeds, "yaws": list(yaws_of(comparison))}
    return Finding(
        facts=comparison.facts(seeds, (*ROLES, "reward")),
        data=data,
        rows=rows,
        says=sentences,
        images=files_by_caption,
    )


def orbit(comparison: Comparison, folder: Path) -> Finding:
    """Show one latent from an arc, before beside after: an animation (APNG), and stills for readers who
    disable motion.
    """
    (seed,) = comparison.seeds(1, EVALUATION)
    reach = math.pi if comparison.of_people else ORBIT_YAW
    # A sine slows the swing at its ends; the last frame meets the first.
    yaws = (reach * np.sin(2 * np.pi * np.arange(ORBIT_FRAMES) / ORBIT_FRAMES)).tolist()
    stills = np.linspace(-reach, reach, ORBIT_STILLS).tolist()
    # views: [frames + stills, 1, R, R] each
    both = [
        shapes(comparison, comparison.generators()[role], [seed], [*yaws, *stills])[0]
        for role in ("before", "after")
    ]
    save_grid(
        torch.cat([role_views[ORBIT_FRAMES:] for role_views in both]),
        (0, 1),
        ORBIT_STILLS,
        folder / "orbit.png",
    )
    frames = torch.cat([role_views[:ORBIT_FRAMES, 0] for role_views in both], dim=2)  # [frames, R, 2R]
    first, *more = (PIL.Image.fromarray(np.rint(frame * 255).astype(np.uint8)) for frame in frames.numpy())
    # `loop` is the number of swings after which the animation stops.
    first.save(
        folder / "orbit.apng", format="PNG", save_all=True, append_images=more, duration=FRAME_MS, loop=SWINGS
    )
    files_by_caption = {
        f"Seed {seed} swung through ±{reach:.2g} radians {SWINGS} times; before left, after right": (
            "orbit.apng"
        ),
        f"Seed {seed} from yaw {-reach:+.1f} to {reach:+.1f} radians; before above, after below": "orbit.png",
    }
    sentences = [
        "One latent, the first of the fixed seeds. It shows the surface from several sides; it is no evidence"
        " about the others."
    ]
    return Finding(
        facts=comparison.facts([seed], ("before", "after")),
        data={"seed": seed, "yaws": yaws},
        says=sentences,
        images=files_by_caption,
    )
