"""The job `reward latent`: trains a reward on a stage's latents and compares it with one on finished
assets.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, options_of, seeds_of, together
from eg3d_rlhf.experiments.mode import Flags
from eg3d_rlhf.modes.flow_flags import source_of
from eg3d_rlhf.modes.shared_flags import file_option, name_option, shared, whole_option
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import Beside


@click.command("latent", cls=GroupedCommand, job="reward latent")
@together(options_of(ProblemSource))
@name_option(
    "--stage", group="What is trained", show_default="the last", help="Stage whose latents the reward reads."
)
@whole_option(
    "--seed", group="Run", default=0, help="First of three training seeds, if --seeds is not given."
)
@option(
    "--seeds",
    group="Run",
    metavar="LIST",
    show_default="--seed and the next two",
    help="Training seeds, such as 0,1,2. The reward of the first seed is written.",
)
@file_option("--out", group="Run", required=True, help="Reward file to write (.safetensors).")
@shared("device")
def latent(stage: str | None, seed: int, seeds: str | None, out: Path, device: str, **source) -> None:
    """Train a reward that reads the latents of a flow stage, so that --mode=online --reward=FILE needs no
    decoding.

    It trains on people's pairs. If a reward of finished assets trained on the same pairs has a learnable
    signal, its scores are added as training data. Both rewards are compared: accuracy on pairs of held-out
    prompts over several training seeds, and the number of samples scored per second.

    \b
    Example:
        eg3d-rlhf reward latent --pipeline=toy --out=runs/latent.safetensors
    """
    from eg3d_rlhf.tuning.flow.base.stage import stage_of
    from eg3d_rlhf.tuning.flow.families.opening import open_problem
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import compared
    from eg3d_rlhf.tuning.flow.training.latent_reward import save
    from training.progress import tqdm

    # three seeds show how much the accuracy varies
    numbers = range(seed, seed + 3) if seeds is None else seeds_of("--seeds", seeds)
    # checked before the slow part
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {out.name}. Rename it.")
    # the problem itself has seed 0; --seed only varies the training of the reward
    problem = open_problem(source_of(ProblemSource, Flags({**source, "seed": 0})), choose_device(device))
    name = stage_of(problem.pipeline, stage or problem.pipeline.stages[-1].name).name
    reward, beside = compared(problem, name, numbers, tqdm.write)
    # the file carries its own accuracy
    reward.record |= {"evaluation": beside.shown()}
    click.echo("\n".join(markdown(beside)))
    click.echo(
        f"\n{save(out, reward)}: stage {name}, training seed {numbers[0]}. {beside.pairs} pairs for"
        f" {beside.conditions} held-out prompts; {len(numbers)} trainings; brackets: 95 % interval over"
        " pairs,"
        " clustered by prompt."
    )


def markdown(beside: "Beside") -> list[str]:
    """Format the comparison of the two rewards as a Markdown table."""
    from eg3d_rlhf.experiments.table import markdown_rows
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import DECODED, LATENT

    rows = []
    for kind, measured in beside.kinds.items():
        accuracy = "{:.3f} [{:.3f}, {:.3f}]".format(*measured.accuracy)
        rows.append(
            [
                kind,
                accuracy,
                ", ".join(f"{share:.3f}" for share in measured.by_seed),
                f"{measured.samples_per_second:,.0f}",
            ]
        )
    # the difference is paired: both rewards score the same pairs
    if beside.difference is not None:
        ratio = beside.kinds[LATENT].samples_per_second / beside.kinds[DECODED].samples_per_second
        rows.append(
            [
                "latent minus decoded",
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*beside.difference),
                "",
                f"x{ratio:.2f}",
            ]
        )
    return markdown_rows(["reward", "accuracy", "seeds", "samples per second"], rows)
