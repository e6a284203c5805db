"""Shapes to look at: the best and worst by reward, the same latents before and after, and an orbit.

Pictures are of geometry alone (shaded first crossings of sigma = 10), as labellers of geometry see it; none is chosen by hand.
Letters: N latents, D, H, W grid points, R pixels per edge.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.seeds import JUDGE
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import NO_CONTROL, ROLES
from eg3d_rlhf.experiments.jobs import Finding, Job
from eg3d_rlhf.experiments.shape_view import shade
from eg3d_rlhf.generators import LoadedGenerator
from training.gan import save_grid

K = 5  # shapes in a top or bottom strip, as in the paper
SHOWN = 6  # latents in the before/after strip, of seeds fixed before any result was seen
YAWS = (0.0, 0.5)  # radians from frontal
ORBIT_FRAMES, ORBIT_YAW = 16, 0.7  # one swing from left to right and back
ORBIT_STILLS = 7  # of the film strip
FRAME_MS, SWINGS = 140, 2  # 4.5 s in all: it stops by itself
RESOLUTION, PIXELS = 128, 128  # grid points per edge of the cube; pixels per edge of a picture


def jobs(c: Comparison) -> list[Job]:
    """Best and worst by reward, chosen seeds, orbit."""
    shown = list(c.seeds(SHOWN, JUDGE))
    size: dict[str, Any] = {"resolution": RESOLUTION, "pixels": PIXELS}
    return [
        c.job("reward-strips", "Best and worst shapes by reward", reward_strips, roles=("before", "after", "reward"), n=c.n, k=K, **size),
        c.job("same-latents", "The same latents before and after", same_latents, roles=(*ROLES, "reward"), seeds=shown, **size),
        c.job("orbit", "Orbit", orbit, roles=("before", "after"), seeds=shown[:1], **size),
    ]


@torch.no_grad()
def shapes(c: Comparison, generator: LoadedGenerator, seeds: Sequence[int], yaws: Sequence[float]) -> torch.Tensor:
    """Shaded shapes [N, yaws, 1, R, R] in 0..1; a latent without a surface is white."""
    spec, parts = SlabSpec.of(generator.generator.bounds, RESOLUTION), []
    for field in c.fields(generator, seeds, batch=max(1, c.batch // 4)):
        sigma = field.density_grid(spec).cpu()
        parts.append(torch.stack([shade(sigma, yaw, PIXELS, field.level) for yaw in yaws], dim=1))
    return torch.cat(parts)


def reward_strips(c: Comparison, folder: Path) -> Finding:
    """Frontal and side views of the K latents with the highest and the lowest reward, per network."""
    seeds, rows, pictures = c.seeds(), [], {}
    k = min(K, len(seeds) // 2)
    for role in ("before", "after"):
        generator = c.generators()[role]
        scores = c.scores(generator, seeds).double().numpy()
        order = np.argsort(-scores, kind="stable")
        for which, chosen in (("highest", order[:k]), ("lowest", order[::-1][:k])):
            picked = [seeds[int(i)] for i in chosen]
            views = shapes(c, generator, picked, YAWS)  # [k, 2, 1, R, R]
            name = f"reward-strips-{role}-{which}.png"
            save_grid(views.transpose(0, 1).flatten(0, 1), (0, 1), k, folder / name)
            listed = ", ".join(f"{seed}: {scores[seed - seeds[0]]:.2f}" for seed in picked)
            pictures[f"{role}, {which} reward from left to right ({listed}); frontal above, turned below"] = name
            rows += [{"role": role, "which": which, "rank": i + 1, "seed": s, "reward": float(scores[s - seeds[0]])}
                     for i, s in enumerate(picked)]
    says = [
        f"The {k} highest and {k} lowest of {len(seeds)} latents by the reward that tuned, each network by itself. What tells highest from "
        "lowest is what the reward sees; whether the highest are better is for the eye, and a fault that they share is one that the reward "
        "does not punish.",
    ]
    return Finding(facts=c.facts(seeds, ("before", "after", "reward")), data={"k": k}, rows=rows, says=says, pictures=pictures)


def same_latents(c: Comparison, folder: Path) -> Finding:
    """One row per network, every seed from YAWS."""
    seeds = list(c.seeds(SHOWN, JUDGE))
    pictures = {}
    views = {role: shapes(c, generator, seeds, YAWS) for role, generator in c.generators().items()}  # [N, yaws, 1, R, R] each
    scores = {f"reward_{role}": c.scores(generator, seeds).double().tolist() for role, generator in c.generators().items()}
    rows = [{"seed": seed, **dict(zip(scores, found, strict=True))} for seed, *found in zip(seeds, *scores.values(), strict=True)]
    for j, yaw in enumerate(YAWS):
        name = f"same-latents-{j}.png"
        save_grid(torch.cat([found[:, j] for found in views.values()]), (0, 1), len(seeds), folder / name)
        pictures[f"Yaw {yaw:+.1f} radians; rows {', '.join(views)}; seeds {seeds[0]}..{seeds[-1]} from left to right"] = name
    says = [
        "Seeds were fixed before any result was seen, so these are ordinary samples and no selection. A few pictures show what kind of "
        "change to expect; how often it happens is in the counted parts of this report.", *([NO_CONTROL] if c.control is None else []),
    ]
    data = {"seeds": seeds, "yaws": list(YAWS)}
    return Finding(facts=c.facts(seeds, (*ROLES, "reward")), data=data, rows=rows, says=says, pictures=pictures)


def orbit(c: Comparison, folder: Path) -> Finding:
    """One latent seen from an arc, before beside after: an animation (APNG), and stills that remain where motion is unwelcome."""
    (seed,) = c.seeds(1, JUDGE)
    yaws = (ORBIT_YAW * np.sin(2 * np.pi * np.arange(ORBIT_FRAMES) / ORBIT_FRAMES)).tolist()
    stills = np.linspace(-ORBIT_YAW, ORBIT_YAW, ORBIT_STILLS).tolist()
    both = [shapes(c, c.generators()[role], [seed], [*yaws, *stills])[0] for role in ("before", "after")]  # [frames + stills, 1, R, R] each
    save_grid(torch.cat([found[ORBIT_FRAMES:] for found in both]), (0, 1), ORBIT_STILLS, folder / "orbit.png")
    frames = torch.cat([found[:ORBIT_FRAMES, 0] for found in both], dim=2)  # [frames, R, 2R]
    first, *more = (PIL.Image.fromarray(np.rint(frame * 255).astype(np.uint8)) for frame in frames.numpy())
    first.save(folder / "orbit.apng", format="PNG", save_all=True, append_images=more, duration=FRAME_MS, loop=SWINGS)  # stops after these
    pictures = {
        f"Seed {seed} swung through ±{ORBIT_YAW:g} radians {SWINGS} times; before left, after right": "orbit.apng",
        f"Seed {seed} from yaw {-ORBIT_YAW:+.1f} to {ORBIT_YAW:+.1f} radians; before above, after below": "orbit.png",
    }
    says = ["One latent, the first of the fixed seeds. It shows the surface in the round and proves nothing about the others."]
    return Finding(facts=c.facts([seed], ("before", "after")), data={"seed": seed, "yaws": yaws}, says=says, pictures=pictures)


