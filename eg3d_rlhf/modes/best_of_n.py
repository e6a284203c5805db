"""The job `reward best-of-n`, which measures how far a reward can be trusted before any tuning.

Best-of-n selection: the reward chooses the sample with the highest score among n samples. The job computes
the expected score of the chosen sample, both under the reward and under a held-out evaluator, as a function
of n.
"""

from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.core.input_paths import check_reward_file
from eg3d_rlhf.modes.shared_flags import print_json, shared
from eg3d_rlhf.rewards.observation_kinds import OBSERVATIONS


def check_reward_or_kind(reward: Path) -> None:
    """Check that a reward file exists, unless the value names a kind of reward that needs no training."""
    if str(reward) not in OBSERVATIONS or reward.exists():
        check_reward_file(reward)


@click.command(cls=GroupedCommand, job="reward best-of-n")
@shared(
    "before reward-ckpt heldout-reward n",
    before={
        "help": "Untuned generator: a network file or a run folder.",
        "show_default": "the bundled generator",
    },
    n={
        "default": 4096,
        "help": "Number of latents that are scored; the reward chooses among random subsets of them.",
    },
    reward_ckpt={
        "check": check_reward_or_kind,
        # several rewards are compared on the same latents
        "multiple": True,
        # click passes a tuple; the empty tuple means the bundled reward
        "default": (),
        "show_default": "the bundled reward",
        "help": (
            "Reward to test: a reward file, an ensemble file, or the name of a reward that needs no training,"
            " such as mesh-validity. May be repeated."
        ),
    },
    heldout_reward={
        "check": check_reward_or_kind,
        "show_default": "the simulated annotator, for synthetic heads",
        "help": "Held-out reward file that scores the choices, as the evaluator.",
    },
)
@option(
    "--most",
    group="Samples",
    metavar="INT",
    type=click.IntRange(min=2),
    default=512,
    help=(
        "Largest number of latents from which the reward chooses the best one, at most --n. Numbers from 1 up"
        " to it are tested."
    ),
)
@shared(
    "outdir device dry-run",
    "data psi level seed batch",
    outdir={"default": "runs/reports/best-of-n"},
    psi={"default": 1.0},
    data=(
        "Dataset that the generator was trained on; the simulated annotator evaluates only generators of"
        " synthetic heads."
    ),
)
def main(before, reward_ckpt, heldout_reward, data, level, outdir, device, dry_run, **sampling) -> None:
    """Measure how far a reward can be trusted before any tuning. The reward chooses the best of n latents,
    and an evaluator scores the choice.

    If the evaluator's score falls before the largest n, the reward is over-optimised: its errors dominate
    the choice. For an ensemble, all members and all aggregates of their scores are compared. The evaluator
    is the reward of --heldout-reward. Without it, generators of synthetic heads are evaluated by the
    simulated annotator without noise.

    \b
    Example:
        eg3d-rlhf reward best-of-n --reward-ckpt=assets/reward.safetensors --n=256 --most=32 --outdir=best
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.evaluation.best_of_n import arms, load_trial, write

    # Loads all networks, also for --dry-run, so that mistakes in the files are reported.
    trial = load_trial(before, reward_ckpt, heldout_reward, data, device, level, **sampling)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        # rewards that are tested alone, and aggregates of the scores of an ensemble's members
        single_rewards, aggregates = arms(trial)
        trial_facts = {
            "networks": trial.networks(),
            "evaluator": "annotator" if trial.evaluator is None else "reward",
            "arms": [*single_rewards, *aggregates],
        }
        print_json(
            {
                **trial_facts,
                "numbers": trial.numbers,
                "level": level,
                **sampling,
                "device": device,
                "outdir": str(outdir),
            }
        )
        return
    finding = write(trial, outdir)
    click.echo("\n".join(finding.says))
    click.echo(f"\nWritten to {outdir}: index.html (open it in a browser), figures/, data/")
