"""The job `reward latent`: trains a reward that reads the latents of a stage of a flow generator.

The job compares this reward with a reward of finished assets, which needs every sample to be decoded.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import (
    GroupedCommand,
    choose_device,
    combine_decorators,
    option,
    options_from_settings,
    seeds_of,
)
from eg3d_rlhf.experiments.mode import Flags
from eg3d_rlhf.modes.flow_flags import make_source
from eg3d_rlhf.modes.shared_flags import file_option, name_option, shared, whole_option
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import RewardComparison


@click.command("latent", cls=GroupedCommand, job="reward latent")
@combine_decorators(options_from_settings(ProblemSource))
@name_option(
    "--stage",
    group="What is trained",
    show_default="the last stage that decides the geometry",
    help="Name of the stage whose latents the reward reads.",
)
@whole_option(
    "--seed",
    group="Run",
    default=0,
    help="First of three consecutive training seeds; without effect if --seeds is given.",
)
@option(
    "--seeds",
    group="Run",
    metavar="LIST",
    show_default="the value of --seed and the next two integers",
    help="Training seeds, separated by commas, such as 0,1,2. The reward of the first seed is written.",
)
@file_option("--out", group="Run", required=True, help="Reward file to write (.safetensors).")
@shared("device")
def latent(stage: str | None, seed: int, seeds: str | None, out: Path, device: str, **source) -> None:
    """Train a reward that reads the latents of one stage of a flow generator. With such a reward, train.py
    --mode=online --reward=FILE need not decode its samples.

    The reward is trained on pairs that people labelled. A reward of finished assets is trained on the same
    pairs. If it is more accurate than chance, its scores become additional training data. The command prints
    the accuracy of both rewards on pairs of held-out prompts, and the number of samples that each scores per
    second.

    \b
    Example:
        eg3d-rlhf reward latent --pipeline=toy --out=runs/latent.safetensors
    """
    # Three seeds show how much the accuracy varies between trainings.
    training_seeds = range(seed, seed + 3) if seeds is None else seeds_of("--seeds", seeds)
    # Checked before the slow training begins.
    if out.suffix != ".safetensors":
        raise ValueError(
            f"--out: the name {out.name} does not end in .safetensors. Choose a name with this ending."
        )
    # The seed of the problem is always 0. --seed changes only the training of the reward.
    problem_source = make_source(ProblemSource, Flags({**source, "seed": 0}))

    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.tuning.flow.base.stage import stage_of
    from eg3d_rlhf.tuning.flow.families.opening import geometry_stage, open_stage
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import compare_rewards
    from eg3d_rlhf.tuning.flow.training.latent_reward import save
    from training.progress import tqdm

    # The pairs answer the question about the geometry, unless --stage names a stage of textures.
    stage = stage or geometry_stage(problem_source.pipeline)
    problem = open_stage(problem_source, stage, choose_device(device))
    stage_name = stage_of(problem.pipeline, stage or problem.pipeline.stages[-1].name).name
    # `tqdm.write` prints lines without breaking the progress bar.
    reward, comparison = compare_rewards(problem, stage_name, training_seeds, tqdm.write)
    # The accuracy is stored in the reward file.
    reward.record |= {"evaluation": comparison.shown()}
    click.echo("\n".join(format_comparison(comparison)))
    click.echo(
        f"\n{save(out, reward)}: stage {stage_name}, training seed {training_seeds[0]}. {comparison.pairs}"
        f" pairs for {comparison.prompts} held-out prompts; {len(training_seeds)} trainings; brackets:"
        " 95 % interval over pairs, clustered by prompt."
    )


def format_comparison(comparison: "RewardComparison") -> list[str]:
    """Format the comparison of the two rewards as the lines of a Markdown table.

    Args:
        comparison: accuracy and speed of the reward of latents and of the reward of finished assets, and the
            difference of their accuracies.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.experiments.table import markdown_rows
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import DECODED, LATENT

    table_rows = []
    for reward_kind, measured_reward in comparison.kinds.items():
        accuracy_text = "{:.3f} [{:.3f}, {:.3f}]".format(*measured_reward.accuracy)
        table_rows.append(
            [
                reward_kind,
                accuracy_text,
                ", ".join(f"{seed_accuracy:.3f}" for seed_accuracy in measured_reward.by_seed),
                f"{measured_reward.samples_per_second:,.0f}",
            ]
        )
    # Both rewards score the same pairs, so the interval of the difference is a paired one. None: no reward of
    # finished assets was trained.
    if comparison.difference is not None:
        speed_ratio = (
            comparison.kinds[LATENT].samples_per_second / comparison.kinds[DECODED].samples_per_second
        )
        table_rows.append(
            [
                "latent minus decoded",
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*comparison.difference),
                "",
                f"x{speed_ratio:.2f}",
            ]
        )
    return markdown_rows(["reward", "accuracy", "seeds", "samples per second"], table_rows)
