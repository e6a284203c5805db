"""How far can a reward be trusted, before any tuning? Lets rewards choose the best of n latents, and a judge say what that is worth.

A curve that falls before the largest n shows where the reward's mistakes take over. Of an ensemble, its members and all its aggregates are
compared. The judge is the annotator without noise for synthetic heads, else the reward that --reward-watch names.

\b
Example:
    python tools/best_of_n.py --reward-ckpt=assets/reward.safetensors --n=256 --most=32 --out=runs/example/best-of-n
"""

import json
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, file_hash, naming, option
from eg3d_rlhf.evaluation import bestofn, flags
from eg3d_rlhf.evaluation.comparison import judged_by_annotator
from eg3d_rlhf.experiments import jobs as running
from eg3d_rlhf.experiments.page import write_page
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.rewards.reward import check_reward, load_reward


def trial_of(before, rewards, reward_watch, data, device, **sampling) -> bestofn.Trial:
    """Load what the flags name. Raises: ValueError, FileNotFoundError naming the flag."""
    where = choose_device(device)
    with naming("--before"):
        generator = load_generator(before, where)
    paths = dict.fromkeys(rewards or [bundled.REWARD])
    names = {path: path.parent.name if path.stem == "reward" and len(paths) > 1 else path.stem for path in paths}
    if len(set(names.values())) < len(names):
        names = {path: str(path) for path in paths}

    def load(path: Path, flag: str):
        with naming(flag):
            reward = load_reward(path, where)
        check_reward(reward, generator.generator, flag)
        return reward, file_hash(path)

    if reward_watch is None and not judged_by_annotator(generator, data):
        raise ValueError("--reward-watch: expected a reward as the judge, got none; the annotator judges synthetic heads alone. Name one.")
    judge = None if reward_watch is None else load(reward_watch, "--reward-watch")
    loaded = {names[path]: load(path, "--reward-ckpt") for path in paths}
    if judge is not None and any(digest == judge[1] or judge[0].is_member_of(one) for one, digest in loaded.values()):
        raise ValueError("--reward-watch: expected a reward that is not on trial, got one that is. Train one on other labels.")
    return bestofn.Trial(generator=generator, rewards=loaded, judge=judge, **sampling)


@click.command(cls=GroupedCommand, help=__doc__)
@flags.shared("before reward-ckpt reward-watch data", before="Generator, untuned.",
              reward_ckpt={"multiple": True, "default": (), "show_default": "the bundled one",
                           "help": "Reward or ensemble on trial; may be given again."},
              reward_watch={"show_default": "the annotator, for synthetic heads", "help": "Second reward as the judge."},
              data={"show_default": "the run's own", "help": "What the generator was trained on."})
@flags.shared("psi n seed", psi={"default": 1.0}, n={"default": 4096, "help": "Latents that are scored."})
@option("--most", group="Samples", metavar="INT", type=click.IntRange(min=2), default=512, help="Largest number to choose among.")
@flags.shared("out fresh batch device dry-run", out={"default": "runs/reports/best-of-n"})
def main(before, reward_ckpt, reward_watch, data, out, fresh, device, dry_run, **sampling) -> None:
    trial = trial_of(before, reward_ckpt, reward_watch, data, device, **sampling)
    if dry_run:
        single, joined = bestofn.arms(trial)
        known = {"networks": trial.networks(), "judge": "annotator" if trial.judge is None else "reward", "arms": [*single, *joined]}
        click.echo(json.dumps({**known, "numbers": trial.numbers, **sampling, "device": device, "out": str(out)}, indent=1))
        return
    first, second = bestofn.jobs(trial)
    scores = running.run([first], out, fresh=fresh)[bestofn.SCORES]
    last = second(scores)
    findings = running.run([last], out, fresh=fresh, quiet=True)
    finding = findings[bestofn.CURVES]
    introduction = (
        f"{trial.n:,} latents of {trial.generator.path.name}, untuned; nothing was trained on them. Each point is the exact mean, over all "
        "ways to draw n of them, of the judge's value of the one that the reward likes best."
    )
    page = write_page(out / "index.html", bestofn.TITLE, introduction, [last], findings, finding.says)
    click.echo("\n".join(finding.says))
    click.echo(f"\nWritten to {page.parent}: {page.name} (open it in a browser), figures/, data/")


if __name__ == "__main__":
    main()
