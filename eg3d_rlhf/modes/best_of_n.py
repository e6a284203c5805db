"""The job `reward best-of-n`, which measures how far a reward can be trusted before any tuning.

The expected score of the best of n latents is computed under the reward that selects and under an evaluator.
"""

import click

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.modes.shared_flags import print_json, shared


@click.command(cls=GroupedCommand, job="reward best-of-n")
@shared(
    "before reward-ckpt heldout-reward n",
    before="Untuned generator: a network file or a run folder.",
    n={"default": 4096, "help": "Number of latents that are scored."},
    reward_ckpt={
        "multiple": True,
        "default": (),
        "show_default": "the bundled one",
        "help": ("Reward or ensemble to test, or an untrained kind such as mesh-validity; may be repeated."),
    },
    heldout_reward={
        "show_default": "the simulated annotator, for synthetic heads",
        "help": "Held-out reward that serves as the evaluator.",
    },
)
@option(
    "--most",
    group="Samples",
    metavar="INT",
    type=click.IntRange(min=2),
    default=512,
    help="Largest n, the number of latents to choose among.",
)
@shared(
    "outdir device dry-run",
    "data psi seed batch",
    outdir={"default": "runs/reports/best-of-n"},
    psi={"default": 1.0},
    data="Dataset that the generator was trained on; by default that of its run.",
)
def main(before, reward_ckpt, heldout_reward, data, outdir, device, dry_run, **sampling) -> None:
    """Measure how far a reward can be trusted before any tuning. The reward chooses the best of n latents,
    and an evaluator scores the choice.

    A curve of the evaluator's score that falls before the largest n shows over-optimisation: the reward's
    errors dominate the choice. For an ensemble, all members and aggregates are compared. The evaluator
    is the simulated annotator without noise for synthetic heads, else the reward of --heldout-reward.

    \b
    Example:
        eg3d-rlhf reward best-of-n --reward-ckpt=assets/reward.safetensors --n=256 --most=32 --outdir=best
    """
    from eg3d_rlhf.evaluation.best_of_n import arms, trial_of, write

    trial = trial_of(before, reward_ckpt, heldout_reward, data, device, **sampling)
    if dry_run:
        # `single`: rewards by themselves; `joined`: aggregates of an ensemble's members
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
