"""Commands about figures: the leaderboard of a campaign's generators, and whether the intervals hold."""

import json
from collections.abc import Mapping

import click
import numpy as np

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.people.label.entities import Mode
from eg3d_rlhf.people.label.leaderboards import as_csv, as_text, leaderboard_of
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_at import database, open_store
from eg3d_rlhf.preferences import coverage
from eg3d_rlhf.preferences.agreement import LEAST_UNITS
from eg3d_rlhf.preferences.leaderboard import LEAST_GAMES, LEAST_PROMPTS


@click.command("leaderboard", cls=GroupedCommand)
@option("--campaign", metavar="NAME", default=None, show_default="all that collect preferences", help="One campaign alone.")
@option("--question", metavar="NAME", default=None, show_default="which is better", help="The votes on this question.")
@option("--json", "kind", flag_value="json", help="Print JSON.", default=None)
@option("--csv", "kind", flag_value="csv", help="Print CSV.")
@database
def leaderboard(campaign: str | None, question: str | None, kind: str | None, db: str) -> None:
    """Rank the generators whose shapes were compared, with 95 % intervals."""
    with open_store(db, create=False) as store:
        _check(store, campaign)
        rows = list(store.judgements(campaign))
    asked = sorted({name for row in rows for name in row.votes})
    if question is not None and question not in asked:
        raise ValueError(f"--question: expected one with votes ({', '.join(asked) or 'there is none'}), got {question}. Name another.")
    board = leaderboard_of(rows, question)
    if kind == "json":
        click.echo(json.dumps({"campaign": campaign, "question": question, **board.to_dict()}, indent=1, ensure_ascii=False))
    else:
        click.echo(as_csv(board) if kind == "csv" else as_text(board), nl=kind != "csv")


def _check(store: Store, campaign: str | None) -> None:
    found = store.campaign(campaign) if campaign is not None else None
    if campaign is not None and found is None:
        raise ValueError(f"--campaign: expected one of this database, got {campaign}. `status` lists them.")
    if found is not None and found.settings.mode is not Mode.LABEL:
        remedy = "tools/study.py report gives its result" if found.settings.mode is Mode.STUDY else "it compares nothing"
        raise ValueError(f"--campaign: expected one that collects preferences, got {campaign} ({found.settings.mode}): {remedy}.")


@click.command("simulate", cls=GroupedCommand)
@click.argument("what", type=click.Choice(("agreement", "leaderboard", "shares")))
@option("--studies", metavar="INT", type=click.IntRange(min=1), default=1000, help="So many of each kind.")
@option("--n", "sizes", metavar="INT", type=click.IntRange(min=2), multiple=True, show_default="the least that is shown, 2 and 5 times it",
        help="Pairs, or prompts of a leaderboard; may be given again.")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Of the draws.")
@option("--json", "as_json", is_flag=True, help="Print every kind of study, as JSON.")
def simulate(what: str, studies: int, sizes: tuple[int, ...], seed: int, as_json: bool) -> None:
    """Draw judgements of a known truth over a grid, and show how often the 95 % intervals hold it."""
    least = LEAST_PROMPTS if what == "leaderboard" else LEAST_UNITS
    tables = {n: _cases(what, n, studies, seed) for n in sizes or (least, 2 * least, 5 * least)}
    if as_json:
        click.echo(json.dumps(tables, indent=1))
        return
    click.echo(f"{'prompts' if what == 'leaderboard' else 'n':>8}  kinds  mean    least   most    within 93-97 %")
    for n, cases in tables.items():
        held = np.array([case["coverage"] for case in cases])
        within = f"{np.sum((held >= 0.93) & (held <= 0.97))} of {len(held)}"
        click.echo(f"{n:>8}  {len(held):>5}  {held.mean():.1%}   {held.min():.1%}   {held.max():.1%}   {within}")


def _cases(what: str, n: int, studies: int, seed: int) -> list[Mapping]:
    if what == "shares":
        return [{"share": share, "coverage": held} for share, held in zip(coverage.SHARES, coverage.share_coverage(n), strict=True)]
    if what == "agreement":
        found = [{**vars(kind), **coverage.agreement_coverage(kind, studies, seed)} for kind in coverage.agreement_grid(n)]
    else:
        kinds = [kind for kind in coverage.leaderboard_grid(n) if kind.games >= LEAST_GAMES]
        found = [{**vars(kind), **coverage.leaderboard_coverage(kind, studies, seed)} for kind in kinds]
    return [case for case in found if case["coverage"] is not None]
