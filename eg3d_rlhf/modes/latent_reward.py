"""The job that teaches a reward to read a stage's latents, and holds it against one of finished assets."""

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
@name_option("--stage", group="What is trained", show_default="the last", help="Whose latents are read.")
@whole_option("--seed", group="Run", default=0, help="First training seed, where --seeds is not given.")
@option(
    "--seeds",
    group="Run",
    metavar="LIST",
    show_default="--seed and the next two",
    help="Training seeds, such as 0,1,2; the reward of the first is written.",
)
@file_option("--out", group="Run", required=True, help="Reward to write, .safetensors.")
@shared("device")
def latent(stage: str | None, seed: int, seeds: str | None, out: Path, device: str, **source) -> None:
    """Teach a reward to read the latents of a flow's stage, for --mode=online --reward=FILE, which then
    decodes nothing.

    It learns from people's pairs; where these teach a reward of finished assets, too, from what that says of
    them. Both stand side by side: the accuracy on pairs of conditions that neither saw, with several training
    seeds, and how many samples a second each scores.

    \b
    Example:
        eg3d-rlhf reward latent --pipeline=toy --out=runs/latent.safetensors
    """
    from eg3d_rlhf.tuning.flow.base.stage import stage_of
    from eg3d_rlhf.tuning.flow.families.opening import open_problem
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import compared
    from eg3d_rlhf.tuning.flow.training.latent_reward import save
    from training.progress import tqdm

    numbers = range(seed, seed + 3) if seeds is None else seeds_of("--seeds", seeds)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {out.name}. Rename it.")
    problem = open_problem(source_of(ProblemSource, Flags({**source, "seed": 0})), choose_device(device))
    name = stage_of(problem.pipeline, stage or problem.pipeline.stages[-1].name).name
    reward, beside = compared(problem, name, numbers, tqdm.write)
    reward.record |= {"evaluation": beside.shown()}
    click.echo("\n".join(markdown(beside)))
    click.echo(
        f"\n{save(out, reward)}: stage {name}, training seed {numbers[0]}. {beside.pairs} pairs of"
        f" {beside.conditions} held-out conditions; {len(numbers)} trainings; brackets: 95 % over pairs,"
        " clustered by condition."
    )


def markdown(beside: "Beside") -> list[str]:
    from eg3d_rlhf.experiments.table import markdown_rows
    from eg3d_rlhf.tuning.flow.training.latent_accuracy import DECODED, LATENT

    rows = []
    for kind, found in beside.kinds.items():
        accuracy = "{:.3f} [{:.3f}, {:.3f}]".format(*found.accuracy)
        rows.append(
            [
                kind,
                accuracy,
                ", ".join(f"{share:.3f}" for share in found.by_seed),
                f"{found.samples_per_second:,.0f}",
            ]
        )
    if beside.difference is not None:
        ratio = beside.kinds[LATENT].samples_per_second / beside.kinds[DECODED].samples_per_second
        rows.append(
            [
                "latent beside decoded",
                "{:+.3f} [{:+.3f}, {:+.3f}]".format(*beside.difference),
                "",
                f"x{ratio:.2f}",
            ]
        )
    return markdown_rows(["reward", "accuracy", "seeds", "samples a second"], rows)
