"""Score generators by a reward that knows one of them: rewards raw, aligned to where it looks, and calibrated to densities that it knows.

Says for each how many of its shapes lie outside what the reward knows, and how steady its ranks are. Writes a page with strips of meshes,
and scores.json.

\b
Example:
    python tools/score.py --n=16 --fit=8 --known=16 --resolution=32 --out=runs/example/scores
"""

import json
from dataclasses import asdict
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, file_hash, naming, option, options_of
from eg3d_rlhf.evaluation import flags, foreign_scores
from eg3d_rlhf.experiments import jobs as running
from eg3d_rlhf.experiments.page import write_page
from eg3d_rlhf.generators import LoadedGenerator, load_generator
from eg3d_rlhf.generators.placed import Place, Placed
from eg3d_rlhf.rewards.reward import check_reward, load_reward


def named(found: list[LoadedGenerator]) -> dict[str, LoadedGenerator]:
    """Generators by a short name: the file's, else its folder's with it, else the path."""
    for name in (lambda path: path.stem, lambda path: f"{path.parent.name}/{path.stem}", str):
        names = {name(one.path): one for one in found}
        if len(names) == len(found):
            break
    return names


def trial_of(networks, reward, reference, device: str, options: foreign_scores.ScoreOptions) -> foreign_scores.Trial:
    """Load what the flags name. Raises: ValueError, FileNotFoundError naming the flag."""
    where = choose_device(device)
    with naming("--reference"):
        known = load_generator(reference, where)
    path = reward or bundled.REWARD
    with naming("--reward"):
        loaded = load_reward(path, where)
    check_reward(loaded, known.generator, "--reference")
    found, place = [], Place(bounds=known.generator.bounds, cameras=known.generator.cameras)
    for source in dict.fromkeys(networks or [reference]):
        with naming("--network"):
            found.append(load_generator(source, where))
            misfits = loaded.observation.misfits(Placed(found[-1].generator, place))
            if misfits:
                raise ValueError(f"{found[-1].path}: expected a generator with {'; with '.join(misfits)}. Leave it out.")
    return foreign_scores.Trial(reward=loaded, reward_hash=file_hash(path), reference=known, networks=named(found), options=options)


@click.command(cls=GroupedCommand, help=__doc__)
@option("--network", "networks", group="What", metavar="FILE|RUN", type=flags.PATH, multiple=True, show_default="the reference",
        help="Generator to score, of any family; may be given again.")
@option("--reward", group="What", metavar="FILE", type=flags.PATH, default=None, show_default="the bundled one", help="Reward.")
@option("--reference", group="What", metavar="FILE|RUN", type=flags.PATH, default=None, show_default="the bundled generator",
        help="Generator whose shapes the reward knows.")
@options_of(foreign_scores.ScoreOptions)
@flags.shared("out fresh device dry-run", out={"default": Path("runs/scores")})
def main(networks, reward, reference, out: Path, fresh: bool, device: str, dry_run: bool, **settings) -> None:
    options = foreign_scores.ScoreOptions(**{name: value for name, value in settings.items() if value is not None})
    trial = trial_of(networks, reward, reference, device, options)
    if dry_run:
        shown = {name: str(one.path) for name, one in trial.networks.items()}
        click.echo(json.dumps({"networks": shown, "reference": str(trial.reference.path), "out": str(out), **asdict(options)}, indent=1))
        return
    parts, last = foreign_scores.jobs(trial)
    findings = running.run(parts, out, fresh=fresh)
    findings |= running.run([last], out, fresh=fresh or not (out / "scores.json").is_file(), quiet=True)
    introduction = (
        f"{options.n} latents each. The reward learnt from shapes of {trial.reference.path.name}. Raw: its crop as a share of each "
        "generator's own cube. Aligned: each generator's typical surface is laid on the reference's by scale and shift. Calibrated: "
        "densities, too, are given the reference's quantiles. Alignment and calibration were fitted on other latents."
    )
    summary = findings[last.key].says
    page = write_page(out / "index.html", "Scores across generators", introduction, [last, *parts], findings, summary)
    for name, finding in zip(trial.networks, (findings[part.key] for part in parts), strict=True):
        click.echo("\n".join([f"{name}:", *(f"  {line}" for line in finding.says)]))
    click.echo(f"\nWritten to {page.parent}: {page.name} (open it in a browser), scores.json, data/")


if __name__ == "__main__":
    main()
