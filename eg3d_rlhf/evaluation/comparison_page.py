"""Evaluation report: its jobs, its conclusions, and renders of shapes.

The conclusions are sentences that the numbers support ("Allowed"), and sentences that they do not support
("Not allowed").
Shapes: N latents, R pixels per edge of a render.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.cli import parse_names
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import geometry, images, rewards
from eg3d_rlhf.evaluation.comparison import Comparison, settings_of
from eg3d_rlhf.evaluation.paired import NO_CONTROL, ROLES, span_apart
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.experiments.pages import Finding, Job
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.image_similarity import load_identity, load_lpips
from eg3d_rlhf.tuning.gan.settings import control_differs
from training.gan import save_grid

TITLE = "Before and after tuning"


def select_jobs(comparison: Comparison, keys_text: str | None = None) -> list[Job]:
    """Return the jobs of the report, in the order of the page.

    Args: keys_text: comma-separated keys of the jobs to return; None selects all jobs.
    Raises: ValueError for an unknown key.
    """
    job_functions = (
        rewards.jobs,
        images.jobs,
        geometry.jobs,
        rewards.curve_jobs,
        geometry.depth_jobs,
        strip_jobs,
    )
    jobs = [job for list_jobs in job_functions for job in list_jobs(comparison)]
    # The jobs keep the page's order, which may differ from the order of `keys_text`.
    selected_keys = None if keys_text is None else parse_names("--only", keys_text, [job.key for job in jobs])
    return [job for job in jobs if selected_keys is None or job.key in selected_keys]


def check_files(comparison: Comparison) -> None:
    """Load the networks of --inception, --lpips and --identity, so that errors occur before the long work.

    Raises: ValueError if one of the files cannot be used.
    """
    if comparison.inception is not None:
        load_features(comparison.inception, comparison.device)
    if comparison.lpips is not None:
        load_lpips(comparison.lpips, comparison.device)
    if comparison.identity is not None:
        load_identity(comparison.identity, comparison.device)


def introduction(comparison: Comparison) -> str:
    """Return the text at the top of the page, which names the networks."""
    # role -> name of the run's folder
    run_names = {
        role: f" of {run.name}"
        for role, run in (("after", comparison.run), ("control", comparison.control_run))
        if run is not None
    }
    network_texts = [
        f"{role} {generator.path.name}{run_names.get(role, '')}"
        for role, generator in comparison.generators().items()
    ]
    return (
        "The same held-out latents through each generator:"
        f" {', '.join(network_texts)}{'; no control' if comparison.control is None else ''}. Every figure"
        " states its latents, networks and interval; its data can be downloaded below it."
    )


def list_conclusions(comparison: Comparison, finding_by_key: Mapping[str, Finding]) -> list[str]:
    """List the conclusions that the numbers support, and then conclusions that they do not support.

    Args: finding_by_key: findings of the jobs by key.
    """
    return [f"Allowed: {conclusion}" for conclusion in _allowed(finding_by_key)] + [
        f"Not allowed: {conclusion}" for conclusion in _not_allowed(comparison, finding_by_key)
    ]


def _allowed(finding_by_key: Mapping[str, Finding]) -> list[str]:
    """List the statements that the intervals support."""
    sentences = []  # without the word "Allowed"
    data_by_job = {key: finding.data for key, finding in finding_by_key.items()}
    change_by_role = data_by_job.get("reward-shift", {}).get("paired", {})  # {} if the job was not selected
    # Only intervals that exclude "no change" support a statement.
    if change_by_role and change_by_role["after"]["mean_lo"] > 0:
        # If the control changed by less than a tenth, further training without the reward is not the cause.
        is_control_unchanged = (
            "control" in change_by_role
            and abs(change_by_role["control"]["mean"]) < 0.1 * change_by_role["after"]["mean"]
        )
        cause_text = (
            "; the control moved by less than a tenth of that, so the reward phase is the cause"
            if is_control_unchanged
            else ""
        )
        tuned_change = change_by_role["after"]
        change_text = span_apart(tuned_change["mean"], tuned_change["mean_lo"], tuned_change["mean_hi"], 0)
        sentences.append(f"the optimised reward rose, by {change_text} on average{cause_text}.")
    for curve_name, curve in data_by_job.get("over-optimisation", {}).get("curves", {}).items():
        # The optimised reward itself is reported above.
        if curve_name != rewards.PROXY and curve["steps"][-1]["lo"] > 0:
            divergence_text = (
                "though it has passed its peak"
                if curve["divergence"] is not None
                else "without a point of divergence"
            )
            origin_text = (
                "from which the labels were sampled with noise"
                if curve_name == rewards.ORACLE
                else "which was not used in tuning"
            )
            last_step = curve["steps"][-1]
            change_text = span_apart(last_step["mean"], last_step["lo"], last_step["hi"], 0, sign="+")
            sentences.append(
                f"the {curve_name}, {origin_text}, rose too ({change_text} standard"
                f" deviations), {divergence_text}."
            )
    for distance_change in data_by_job.get("image-distances", {}).get("changes", []):
        if distance_change["role"] == "after" and not distance_change["lo"] <= 0 <= distance_change["hi"]:
            sentences.append(
                f"images moved {'away from' if distance_change['lo'] > 0 else 'towards'} the data"
                f" ({distance_change['distance']} distance)."
            )
    for diversity_row in data_by_job.get("diversity", {}).get("rows", []):
        if diversity_row["role"] == "after" and (
            diversity_row["ratio_hi"] < 1 or diversity_row["ratio_lo"] > 1
        ):
            comparative_word = "less" if diversity_row["ratio_hi"] < 1 else "more"
            ratio_text = span_apart(
                diversity_row["ratio"], diversity_row["ratio_lo"], diversity_row["ratio_hi"], 1
            )
            sentences.append(
                f"{diversity_row['of']} of different latents are {comparative_word} diverse"
                f" ({ratio_text} times as before)."
            )
    return sentences or ["nothing: no selected part shows a change whose interval excludes zero change."]


def _not_allowed(comparison: Comparison, finding_by_key: Mapping[str, Finding]) -> list[str]:
    """List statements that the numbers do not support."""
    sentences = [
        "that people prefer the tuned shapes: no person was asked here. Let people compare them in a blind"
        " test.",
        (
            "any statement on other training seeds: there is one run for each setting, and intervals are over"
            " latents."
        ),
    ]
    if comparison.control is None:
        sentences.append("the cause of a change: without a control, further training alone may have made it.")
    elif (
        comparison.run
        and comparison.control_run
        and (
            difference_texts := control_differs(
                settings_of(comparison.run), settings_of(comparison.control_run)
            )
        )
    ):
        sentences.append(
            "a change that is due to the reward alone: the control also differs in"
            f" {', '.join(difference_texts)}."
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
                "there is no held-out reward."
                if comparison.held_out is None
                else "the held-out reward was trained on the same labels as the tuning reward."
            )
        )
    if comparison.synthetic:
        sentences.append(
            "anything on photographs of people: these are rendered heads, and the oracle is a formula."
        )
    absent_keys = [key for key, finding in finding_by_key.items() if "absent" in finding.data]
    if absent_keys:
        sentences.append(
            f"statements of these sections, which could not be computed (each states the reason):"
            f" {', '.join(absent_keys)}."
        )
    return sentences


# Renders of shapes: the best and worst by reward, the same latents before and after, and an orbit. Renders
# show the geometry only: the shaded surface at the generator's level, as annotators of geometry see it. No
# latent is selected by hand.

K = 5  # number of shapes in a strip of the best or the worst, as in the paper
# number of latents of which the shapes before and after are shown; their seeds were fixed before any result
# was known
SHOWN = 6
YAWS = (0.0, 0.5)  # yaws of the two renders of a shape, in radians from frontal
# the same for synthetic heads, which are defective at the back
BOTH_SIDES = (0.4, math.pi - 0.4)
ORBIT_FRAMES = 16  # frames of one swing of the camera from left to right and back
ORBIT_YAW = 0.7  # largest yaw of the swing in radians; synthetic heads are shown up to the back (π)
ORBIT_STILLS = 7  # still images of the orbit
FRAME_MS = 140  # milliseconds per frame
SWINGS = 2  # number of swings, after which the animation stops; 4.5 s in total
RESOLUTION = 128  # grid points per edge of the cube
PIXELS = 128  # pixels per edge of a render


def strip_jobs(comparison: Comparison) -> list[Job]:
    """Return the jobs that render shapes: the best and the worst shapes by reward, a few latents before and
    after tuning, and one latent seen by a camera that swings (for the bundled heads, one that orbits).
    """
    shown_seeds = list(comparison.seeds(SHOWN, EVALUATION))
    # The sizes are inputs of the jobs, so that a job is computed again if one of them changes.
    size_inputs: dict[str, Any] = {
        "resolution": RESOLUTION,
        "pixels": PIXELS,
        "yaws": choose_yaws(comparison),
    }
    return [
        comparison.job(
            "reward-strips",
            "Best and worst shapes by reward",
            reward_strips,
            roles=("before", "after", "reward"),
            n=comparison.n,
            k=K,
            **size_inputs,
        ),
        comparison.job(
            "same-latents",
            "The same latents before and after",
            same_latents,
            roles=(*ROLES, "reward"),
            seeds=shown_seeds,
            **size_inputs,
        ),
        comparison.job(
            "orbit", "Orbit", orbit, roles=("before", "after"), seeds=shown_seeds[:1], **size_inputs
        ),
    ]


def choose_yaws(comparison: Comparison) -> tuple[float, float]:
    """Return the two yaws from which shapes are rendered."""
    return BOTH_SIDES if comparison.of_people else YAWS


@torch.no_grad()
def shapes(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int], yaws: Sequence[float]
) -> torch.Tensor:
    """Render the shapes of seeds from several yaws, shaded and without colours. The cell of a latent without
    a surface states the reason.

    Args: yaws: yaws of the camera, in radians from frontal.
    Returns: renders, [N, number of yaws, 1, R, R] in 0..1.
    """
    spec = SlabSpec.from_bounds(generator.generator.bounds, RESOLUTION)
    renders_by_batch = []
    # A quarter of the batch size, since a density grid has RESOLUTION^3 points per shape.
    for field in comparison.fields(generator, seeds, batch_size=max(1, comparison.batch // 4)):
        sigma = field.density_grid(spec).cpu()  # [n, D, H, W]
        renders_by_batch.append(torch.stack([shade(sigma, yaw, PIXELS, field.level) for yaw in yaws], dim=1))
    return torch.cat(renders_by_batch)


def reward_strips(comparison: Comparison, folder: Path) -> Finding:
    """Render two views of the latents with the highest and with the lowest rewards of each network."""
    seeds = comparison.seeds()  # N held-out latents
    table_rows = []
    files_by_caption = {}
    # At most half of the latents, since the strips of the best and the worst must not overlap.
    k = min(K, len(seeds) // 2)
    top_row_yaw, bottom_row_yaw = choose_yaws(comparison)
    for role in ("before", "after"):
        generator = comparison.generators()[role]
        scores = comparison.scores(generator, seeds).double().numpy()  # [N]
        # A stable sort, so that seeds of equal scores keep their order.
        best_first = np.argsort(-scores, kind="stable")
        for end_name, chosen_indices in (("highest", best_first[:k]), ("lowest", best_first[::-1][:k])):
            chosen_seeds = [seeds[int(latent_index)] for latent_index in chosen_indices]
            shape_renders = shapes(
                comparison, generator, chosen_seeds, choose_yaws(comparison)
            )  # [k, 2, 1, R, R]
            image_name = f"reward-strips-{role}-{end_name}.png"
            # [k, 2, ...] -> [2 k, ...]: a row with the first yaw of the k shapes, then a row with the second
            save_grid(shape_renders.transpose(0, 1).flatten(0, 1), (0, 1), k, folder / image_name)
            # Seeds are consecutive, so the index of a seed is its difference to the first seed.
            score_texts = ", ".join(f"{seed}: {scores[seed - seeds[0]]:.2f}" for seed in chosen_seeds)
            files_by_caption[
                f"{role}, {end_name} reward from left to right ({score_texts}); yaw {top_row_yaw:+.1f} above,"
                f" {bottom_row_yaw:+.1f} radians below"
            ] = image_name
            table_rows += [
                {
                    "role": role,
                    "which": end_name,
                    "rank": rank_index + 1,
                    "seed": seed,
                    "reward": float(scores[seed - seeds[0]]),
                }
                for rank_index, seed in enumerate(chosen_seeds)
            ]
    sentences = [
        (
            f"The {k} highest and {k} lowest of {len(seeds)} latents by the tuning reward, for each network."
            " The difference between the highest and the lowest shows what the reward measures. Check by eye"
            " whether the highest are better. A defect that they share is not penalised by the reward."
        ),
    ]
    return Finding(
        facts=comparison.facts(seeds, ("before", "after", "reward")),
        data={"k": k},
        rows=table_rows,
        says=sentences,
        images=files_by_caption,
    )


def same_latents(comparison: Comparison, folder: Path) -> Finding:
    """Render the same fixed latents with each generator."""
    seeds = list(comparison.seeds(SHOWN, EVALUATION))
    files_by_caption = {}
    # role -> [N, 2, 1, R, R], two views of each latent
    views_by_role = {
        role: shapes(comparison, generator, seeds, choose_yaws(comparison))
        for role, generator in comparison.generators().items()
    }
    scores_by_column = {
        f"reward_{role}": comparison.scores(generator, seeds).double().tolist()
        for role, generator in comparison.generators().items()
    }
    table_rows = [
        {"seed": seed, **dict(zip(scores_by_column, seed_scores, strict=True))}
        for seed, *seed_scores in zip(seeds, *scores_by_column.values(), strict=True)
    ]
    for yaw_index, yaw in enumerate(choose_yaws(comparison)):
        image_name = f"same-latents-{yaw_index}.png"
        # one row for each network
        save_grid(
            torch.cat([role_views[:, yaw_index] for role_views in views_by_role.values()]),
            (0, 1),
            len(seeds),
            folder / image_name,
        )
        files_by_caption[
            f"Yaw {yaw:+.1f} radians; rows {', '.join(views_by_role)}; seeds {seeds[0]}..{seeds[-1]} from"
            " left to right"
        ] = image_name
    sentences = [
        (
            "The seeds were fixed before any result was known, so these samples were not selected. A few"
            " renders show the kind of the change. The statistics of this report show how often it occurs."
        ),
        *([NO_CONTROL] if comparison.control is None else []),
    ]
    finding_data = {"seeds": seeds, "yaws": list(choose_yaws(comparison))}
    return Finding(
        facts=comparison.facts(seeds, (*ROLES, "reward")),
        data=finding_data,
        rows=table_rows,
        says=sentences,
        images=files_by_caption,
    )


def orbit(comparison: Comparison, folder: Path) -> Finding:
    """Render one latent from a swinging camera, before and after side by side.

    An animation (APNG) is written, and a sheet of still images for readers who disable motion.
    """
    (seed,) = comparison.seeds(1, EVALUATION)
    largest_yaw = math.pi if comparison.of_people else ORBIT_YAW
    # A sine slows the swing at its ends. The last frame is followed by the first one without a jump.
    yaws = (largest_yaw * np.sin(2 * np.pi * np.arange(ORBIT_FRAMES) / ORBIT_FRAMES)).tolist()
    still_yaws = np.linspace(-largest_yaw, largest_yaw, ORBIT_STILLS).tolist()  # radians, from left to right
    # each [ORBIT_FRAMES + ORBIT_STILLS, 1, R, R]; [0] is the only latent
    views_by_network = [
        shapes(comparison, comparison.generators()[role], [seed], [*yaws, *still_yaws])[0]
        for role in ("before", "after")
    ]
    save_grid(
        torch.cat([role_views[ORBIT_FRAMES:] for role_views in views_by_network]),
        (0, 1),
        ORBIT_STILLS,
        folder / "orbit.png",
    )
    # the frames before and after tuning are side by side, [ORBIT_FRAMES, R, 2R]
    frames = torch.cat([role_views[:ORBIT_FRAMES, 0] for role_views in views_by_network], dim=2)
    first_frame, *other_frames = (
        PIL.Image.fromarray(np.rint(frame * 255).astype(np.uint8)) for frame in frames.numpy()
    )
    # `loop` is the number of swings after which the animation stops.
    first_frame.save(
        folder / "orbit.apng",
        format="PNG",
        save_all=True,
        append_images=other_frames,
        duration=FRAME_MS,
        loop=SWINGS,
    )
    files_by_caption = {
        f"Seed {seed} swung through ±{largest_yaw:.2g} radians {SWINGS} times; before left, after right": (
            "orbit.apng"
        ),
        f"Seed {seed} from yaw {-largest_yaw:+.1f} to {largest_yaw:+.1f} rad; before above, after below": (
            "orbit.png"
        ),
    }
    sentences = [
        "One latent, the first of the fixed seeds, seen from several sides. It is no evidence about other"
        " latents."
    ]
    return Finding(
        facts=comparison.facts([seed], ("before", "after")),
        data={"seed": seed, "yaws": yaws},
        says=sentences,
        images=files_by_caption,
    )
