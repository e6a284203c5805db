"""The command `reward best-of-n`: how far a reward can be trusted, before any tuning."""

import click

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.modes.shared_flags import print_json, shared


@click.command(cls=GroupedCommand, job="reward best-of-n")
@shared(
    "before reward-ckpt heldout-reward n",
    before="Generator, untuned.",
    n={"default": 4096, "help": "Latents that are scored."},
    reward_ckpt={
        "multiple": True,
        "default": (),
        "show_default": "the bundled one",
        "help": (
            "Reward or ensemble on trial, or a kind without training, such as mesh-validity; may be given"
            " again."
        ),
    },
    heldout_reward={
        "show_default": "the annotator, for synthetic heads",
        "help": "Held-out reward as the evaluator.",
    },
)
@option(
    "--most",
    group="Samples",
    metavar="INT",
    type=click.IntRange(min=2),
    default=512,
    help="Largest number to choose among.",
)
@shared(
    "outdir device dry-run",
    "data psi seed batch",
    outdir={"default": "runs/reports/best-of-n"},
    psi={"default": 1.0},
    data="What the generator was trained on; else the run's own.",
)
def main(before, reward_ckpt, heldout_reward, data, outdir, device, dry_run, **sampling) -> None:
    """How far can a reward be trusted, before any tuning? Lets rewards choose the best of n latents, and an
    evaluator says what that is worth.

    A curve that falls before the largest n shows where the reward's mistakes take over. Of an ensemble, its
    members and all its aggregates are compared. The evaluator is the simulated annotator without noise for
    synthetic heads, else the reward that --heldout-reward names.

    \b
    Example:
        eg3d-rlhf reward best-of-n --reward-ckpt=assets/reward.safetensors --n=256 --most=32 --outdir=best
    """
    from eg3d_rlhf.evaluation.best_of_n import arms, trial_of, write

    trial = trial_of(before, reward_ckpt, heldout_reward, data, device, **sampling)
    if dry_run:
        single, joined = arms(trial)
        known = {
            "networks": trial.networks(),
            "evaluator": "annotator" if trial.evaluator is None else "reward",
            "arms": [*single, *joined],
        }
        print_json({**known, "numbers": trial.numbers, **sampling, "device": device, "outdir": str(outdir)})
        return
    finding = write(trial, outdir)
    click.echo("\n".join(finding.says))
    click.echo(f"\nWritten to {outdir}: index.html (open it in a browser), figures/, data/")
