"""Rate methods by Elo from pairwise judgements of their assets: GPTEval3D's tournament, people's or a judge's.

A judgement is a line of JSON: {"a": "sds", "b": "dreamdpo", "winner": "b", "prompt": "a bust", "criterion": "overall"}; winner is a, b or
tie, prompt and criterion may be left out. Runs of train.py --mode=distill --compare=... write judgements.jsonl.

\b
Example:
    python tools/tournament.py runs/00000-distill/judgements.jsonl
"""

import json
from collections import defaultdict
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.core.cli import GroupedCommand, naming, option
from eg3d_rlhf.preferences.elo import DRAWS, elo, markdown, read_judgements
from training.storage import write_atomic


def read_held(path: Path | None) -> dict[str, dict[str, float]]:
    """Ratings by criterion of a file that --out wrote."""
    if path is None:
        return {}
    with naming("--held"):
        try:
            tables = json.loads(path.read_text())
            return {c: {name: float(row["elo"]) for name, row in table["ratings"].items()} for c, table in tables.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected what --out writes, got: {error!r}. Name such a file.") from None


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@option("--draws", type=click.Choice(DRAWS), default="both", help="A draw is a win for both, as GPTEval3D has it, or Davidson's tie.")
@option("--held", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
        help="Ratings that stay (an --out file): only new methods move.")
@option("--mean", metavar="ELO", type=float, default=1000.0, help="Mean of all ratings; without effect with --held.")
@option("--resamples", metavar="INT", type=click.IntRange(min=40), default=200, help="Of prompts, behind the intervals.")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Of the resamples.")
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Write the ratings as JSON, too.")
def main(files, draws, held, mean, resamples, seed, out) -> None:
    by_criterion = defaultdict(list)
    for file in files:
        for judgement in read_judgements(file):
            by_criterion[judgement.criterion].append(judgement)
    known = read_held(held)
    tables = {}
    for criterion, found in sorted(by_criterion.items()):
        stay = known.get(criterion, {})
        if {name for j in found for name in (j.a, j.b)} <= stay.keys():
            click.echo(f"{criterion}: left out, all its methods are held.", err=True)
            continue
        tables[criterion] = elo(found, draws=draws, mean=mean, held=stay, resamples=resamples, seed=seed)
    if out is not None:
        write_atomic(out, (json.dumps({c: table.to_dict() for c, table in tables.items()}, indent=1) + "\n").encode())
    click.echo(markdown(tables))


if __name__ == "__main__":
    main()
