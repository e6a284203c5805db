"""The evaluation report: which parts it has, what it says first, what its figures cannot say, and shapes to
look at.

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


def select(c: Comparison, keys: str | None = None) -> list[Job]:
    """The report's parts, or those of a comma-separated list of keys.

    Raises: ValueError for an unknown key.
    """
    parts = (rewards.jobs, images.jobs, geometry.jobs, rewards.curve_jobs, geometry.depth_jobs, strip_jobs)
    jobs = [job for part in parts for job in part(c)]
    wanted = None if keys is None else some_of("--only", keys, [job.key for job in jobs])
    return [job for job in jobs if wanted is None or job.key in wanted]


def check_files(c: Comparison) -> None:
    """Open the networks that the user names before minutes of work depend on them. Raises: ValueError."""
    if c.inception is not None:
        load_features(c.inception, c.device)
    if c.lpips is not None:
        load_lpips(c.lpips, c.device)
    if c.identity is not None:
        load_identity(c.identity, c.device)


def introduction(c: Comparison) -> str:
    of = {
        role: f" of {run.name}"
        for role, run in (("after", c.run), ("control", c.control_run))
        if run is not None
    }
    named = [f"{role} {generator.path.name}{of.get(role, '')}" for role, generator in c.generators().items()]
    return (
        "The same held-out latents through each generator:"
        f" {', '.join(named)}{'; no control' if c.control is None else ''}. Every figure states its latents,"
        " networks and interval; its data can be downloaded below it."
    )


def summary(c: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    """What the numbers allow, then what they do not."""
    return [f"Allowed: {text}" for text in _allowed(findings)] + [
        f"Not allowed: {text}" for text in _not_allowed(c, findings)
    ]


def _allowed(findings: Mapping[str, Finding]) -> list[str]:
    says = []
    data = {key: finding.data for key, finding in findings.items()}
    paired = data.get("reward-shift", {}).get("paired", {})
    if paired and paired["after"]["mean_lo"] > 0:
        alone = "control" in paired and abs(paired["control"]["mean"]) < 0.1 * paired["after"]["mean"]
        cause = (
            "; the control moved by less than a tenth of that, so the reward phase did it" if alone else ""
        )
        says.append(f"the optimised reward rose, by {paired['after']['mean']:.2f} on average{cause}.")
    for name, curve in data.get("over-optimisation", {}).get("curves", {}).items():
        if name != rewards.PROXY and curve["steps"][-1]["lo"] > 0:
            end = (
                "though it has passed its peak"
                if curve["divergence"] is not None
                else "without a point of divergence"
            )
            part = (
                "whose noisy answers the labels are"
                if name == rewards.ORACLE
                else "which took no part in tuning"
            )
            says.append(
                f"the {name}, {part}, rose too ({curve['steps'][-1]['mean']:+.2f} standard deviations),"
                f" {end}."
            )
    for change in data.get("image-distances", {}).get("changes", []):
        if change["role"] == "after" and not change["lo"] <= 0 <= change["hi"]:
            says.append(
                f"images moved {'away from' if change['lo'] > 0 else 'towards'} the data"
                f" ({change['distance']} distance)."
            )
    for row in data.get("diversity", {}).get("rows", []):
        if row["role"] == "after" and (row["ratio_hi"] < 1 or row["ratio_lo"] > 1):
            kind = "less" if row["ratio_hi"] < 1 else "more"
            says.append(f"{row['of']} of different latents are {kind} diverse ({row['ratio']:.2f} times).")
    return says or ["nothing: no selected part shows a change whose interval excludes none."]


def _not_allowed(c: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    says = [
        "that people prefer the tuned shapes: nobody was asked here. Compare them blind.",
        (
            "any statement on other training seeds: there is one run for each setting, and intervals run over"
            " latents."
        ),
    ]
    if c.control is None:
        says.append("the cause of a change: without a control, further training alone may have made it.")
    elif (
        c.run and c.control_run and (other := control_differs(settings_of(c.run), settings_of(c.control_run)))
    ):
        says.append(f"a clean comparison with the control: its run also differs in {', '.join(other)}.")
    if c.held_out is None or c.held_out.labels == c.reward.labels or c.held_out.labels & c.reward.labels:
        says.append(
            "freedom from over-optimisation in general: "
            + (
                "there is no second reward."
                if c.held_out is None
                else "the second reward learnt from the same labels as the first."
            )
        )
    if c.synthetic:
        says.append(
            "anything on photographs of people: these are rendered heads, and the oracle is a formula."
        )
    missing = [key for key, finding in findings.items() if "absent" in finding.data]
    if missing:
        says.append(
            f"what these parts would say, which could not be made (each says why): {', '.join(missing)}."
        )
    return says


# Shapes to look at: the best and worst by reward, the same latents before and after, and an orbit. Pictures
# are of geometry alone (shaded first crossings of sigma = 10), as labellers of geometry see it; none is
# chosen by hand.

K = 5  # shapes in a top or bottom strip, as in the paper
SHOWN = 6  # latents in the before/after strip, of seeds fixed before any result was seen
# radians from frontal; of heads of people, whose scans are broken behind
YAWS = (0.0, 0.5)
BOTH_SIDES = (0.4, math.pi - 0.4)
# one swing from left to right and back; of heads of people all the way to behind
ORBIT_FRAMES = 16
ORBIT_YAW = 0.7
ORBIT_STILLS = 7  # of the film strip
# 4.5 s in all: it stops by itself
FRAME_MS = 140
SWINGS = 2
# grid points per edge of the cube; pixels per edge of a picture
RESOLUTION = 128
PIXELS = 128


def strip_jobs(c: Comparison) -> list[Job]:
    shown = list(c.seeds(SHOWN, EVALUATION))
    size: dict[str, Any] = {"resolution": RESOLUTION, "pixels": PIXELS, "yaws": yaws_of(c)}
    return [
        c.job(
            "reward-strips",
            "Best and worst shapes by reward",
            reward_strips,
            roles=("before", "after", "reward"),
            n=c.n,
            k=K,
            **size,
        ),
        c.job(
            "same-latents",
            "The same latents before and after",
            same_latents,
            roles=(*ROLES, "reward"),
            seeds=shown,
            **size,
        ),
        c.job("orbit", "Orbit", orbit, roles=("before", "after"), seeds=shown[:1], **size),
    ]


def yaws_of(c: Comparison) -> tuple[float, float]:
    """From where shapes are seen."""
    return BOTH_SIDES if c.of_people else YAWS


@torch.no_grad()
def shapes(
    c: Comparison, generator: LoadedGenerator, seeds: Sequence[int], yaws: Sequence[float]
) -> torch.Tensor:
    """Shaded shapes [N, yaws, 1, R, R] in 0..1; a latent without a surface is white."""
    spec = SlabSpec.of(generator.generator.bounds, RESOLUTION)
    parts = []
    for field in c.fields(generator, seeds, batch=max(1, c.batch // 4)):
        sigma = field.density_grid(spec).cpu()
        parts.append(torch.stack([shade(sigma, yaw, PIXELS, field.level) for yaw in yaws], dim=1))
    return torch.cat(parts)


def reward_strips(c: Comparison, folder: Path) -> Finding:
    """Two views of the K latents with the highest and the lowest reward, per network."""
    seeds = c.seeds()
    rows = []
    pictures = {}
    k = min(K, len(seeds) // 2)
    above, below = yaws_of(c)
    for role in ("before", "after"):
        generator = c.generators()[role]
        scores = c.scores(generator, seeds).double().numpy()
        order = np.argsort(-scores, kind="stable")
        for which, chosen in (("highest", order[:k]), ("lowest", order[::-1][:k])):
            picked = [seeds[int(i)] for i in chosen]
            views = shapes(c, generator, picked, yaws_of(c))  # [k, 2, 1, R, R]
            name = f"reward-strips-{role}-{which}.png"
            save_grid(views.transpose(0, 1).flatten(0, 1), (0, 1), k, folder / name)
            listed = ", ".join(f"{seed}: {scores[seed - seeds[0]]:.2f}" for seed in picked)
            pictures[
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
    says = [
        (
            f"The {k} highest and {k} lowest of {len(seeds)} latents by the reward that tuned, each network"
            " by itself. What tells highest from lowest is what the reward sees; whether the highest are"
            " better is for the eye, and a fault that they share is one that the reward does not punish."
        ),
    ]
    return Finding(
        facts=c.facts(seeds, ("before", "after", "reward")),
        data={"k": k},
        rows=rows,
        says=says,
        images=pictures,
    )


def same_latents(c: Comparison, folder: Path) -> Finding:
    seeds = list(c.seeds(SHOWN, EVALUATION))
    pictures = {}
    # [N, yaws, 1, R, R] each
    views = {role: shapes(c, generator, seeds, yaws_of(c)) for role, generator in c.generators().items()}
    scores = {
        f"reward_{role}": c.scores(generator, seeds).double().tolist()
        for role, generator in c.generators().items()
    }
    rows = [
        {"seed": seed, **dict(zip(scores, found, strict=True))}
        for seed, *found in zip(seeds, *scores.values(), strict=True)
    ]
    for j, yaw in enumerate(yaws_of(c)):
        name = f"same-latents-{j}.png"
        save_grid(torch.cat([found[:, j] for found in views.values()]), (0, 1), len(seeds), folder / name)
        pictures[
            f"Yaw {yaw:+.1f} radians; rows {', '.join(views)}; seeds {seeds[0]}..{seeds[-1]} from left to"
            " right"
        ] = name
    says = [
        (
            "Seeds were fixed before any result was seen, so these are ordinary samples and no selection. A"
            " few pictures show what kind of change to expect; how often it happens is in the counted parts"
            " of this report."
        ),
        *([NO_CONTROL] if c.control is None else []),
    ]
    data = {"seeds": seeds, "yaws": list(yaws_of(c))}
    return Finding(facts=c.facts(seeds, (*ROLES, "reward")), data=data, rows=rows, says=says, images=pictures)


def orbit(c: Comparison, folder: Path) -> Finding:
    """One latent seen from an arc, before beside after: an animation (APNG), and stills that remain where
    motion is unwelcome.
    """
    (seed,) = c.seeds(1, EVALUATION)
    reach = math.pi if c.of_people else ORBIT_YAW
    yaws = (reach * np.sin(2 * np.pi * np.arange(ORBIT_FRAMES) / ORBIT_FRAMES)).tolist()
    stills = np.linspace(-reach, reach, ORBIT_STILLS).tolist()
    # [frames + stills, 1, R, R] each
    both = [shapes(c, c.generators()[role], [seed], [*yaws, *stills])[0] for role in ("before", "after")]
    save_grid(torch.cat([found[ORBIT_FRAMES:] for found in both]), (0, 1), ORBIT_STILLS, folder / "orbit.png")
    frames = torch.cat([found[:ORBIT_FRAMES, 0] for found in both], dim=2)  # [frames, R, 2R]
    first, *more = (PIL.Image.fromarray(np.rint(frame * 255).astype(np.uint8)) for frame in frames.numpy())
    # stops after these
    first.save(
        folder / "orbit.apng", format="PNG", save_all=True, append_images=more, duration=FRAME_MS, loop=SWINGS
    )
    pictures = {
        f"Seed {seed} swung through ±{reach:.2g} radians {SWINGS} times; before left, after right": (
            "orbit.apng"
        ),
        f"Seed {seed} from yaw {-reach:+.1f} to {reach:+.1f} radians; before above, after below": "orbit.png",
    }
    says = [
        "One latent, the first of the fixed seeds. It shows the surface in the round and proves nothing about"
        " the others."
    ]
    return Finding(
        facts=c.facts([seed], ("before", "after")),
        data={"seed": seed, "yaws": yaws},
        says=says,
        images=pictures,
    )
