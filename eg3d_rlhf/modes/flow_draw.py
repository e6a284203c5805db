"""`eg3d-rlhf flow draw` and `flow label`: assets of WORK's generator, and what people say of them."""

from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, together
from eg3d_rlhf.experiments.mode import running
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.entities import CampaignSettings
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.store import open_store
from eg3d_rlhf.tuning.flow.drawing import Drawing, Drawn, drawing_of
from eg3d_rlhf.tuning.flow.work import BASE, SHOWN, TEST, Work
from training.progress import tqdm

AGAIN = "The same command"
SECONDS = 8  # that an answer takes
work_argument = click.argument("folder", metavar="WORK", type=click.Path(path_type=Path, file_okay=False))
device_flag = option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where networks run.")
drawing_flags = together(
    option("--cells", rare=True, metavar="N", type=click.IntRange(2), default=None, show_default="the family's",
           help="Per axis of the grid that meshes are read on: 128 for Hunyuan3D-2.1, 384 as published."),
    option("--few-steps", rare=True, metavar="N", type=click.IntRange(1), default=None,
           help="Draw in N steps, without guidance, where a network reads how long a step is (SAM 3D's structure)."),
    option("--timeout", rare=True, metavar="MINUTES", type=click.FloatRange(min=0, min_open=True), default=30,
           help="With torchrun: longest wait for another process."),
)  # fmt: skip


@click.command("draw", cls=GroupedCommand)
@work_argument
@device_flag
@drawing_flags
def draw(folder: Path, device: str, cells: int | None, few_steps: int | None, timeout: float) -> None:
    """Assets of the generator as it is, to compare, with the latents that they came from; those of test conditions are not drawn.

    Where it was stopped, it goes on. torchrun's processes share the work.

    \b
    Example:
        eg3d-rlhf flow draw WORK
    """
    work = Work.open(folder)
    family = work.check_pipeline()
    with running(device, timeout, AGAIN) as ranks:
        where = choose_device(device) if ranks.world == 1 else ranks.device
        drawing = drawing_of(work, family, BASE, SHOWN, where, ranks, cells=cells, few_steps=few_steps)
        drawn = drawn_with_bar(drawing)
        if not ranks.main:
            return
    for line in told(drawing, drawn):
        click.echo(line)
    if family.remark is not None:
        click.echo(family.remark(drawing.folder, work.lines(), drawing.pipeline))
    click.echo(f"{len(work.names(TEST))} conditions are kept for the test")
    click.echo(f"next: eg3d-rlhf flow label {folder}")


def drawn_with_bar(drawing: Drawing) -> Drawn:
    """Draw, with the time that is left."""
    total = len(drawing.jobs)
    with tqdm(total=total, desc=f"drawing {drawing.folder.name}", unit="asset", disable=None if drawing.ranks.main else True) as bar:
        done = drawing.run(bar.update)
        bar.update(total - bar.n)  # what other ranks drew
    return done


def told(drawing: Drawing, drawn: Drawn) -> list[str]:
    """What was drawn and left out."""
    lines = [f"{drawn.count} assets in {drawing.folder}"]
    if drawn.left_out:
        lines.append(f"{len(drawn.left_out)} more have no surface and are left out: {drawn.left_out[0]}")
    return lines


@click.command("label", cls=GroupedCommand)
@work_argument
@option("--pairs", metavar="N", type=click.IntRange(1), default=None, show_default="as many as assets", help="How many are compared.")
@option("--campaign", rare=True, metavar="NAME", default=None, show_default="WORK's", help="Another one, of labels.db.")
@launch.server_options("access.jsonl in WORK")
def label(folder: Path, pairs: int | None, campaign: str | None, **server) -> None:
    """Compare what was drawn, two assets of one condition at a time, in the browser; prints the address.

    \b
    Example:
        eg3d-rlhf flow label WORK
    """
    work = Work.open(folder)
    flags = launch.ServerFlags.of(server, folder)
    assets = len(work.lines())
    with open_store(work.database, create=True) as store:
        if flags.exposed:
            launch.check_annotators(store, flags.host, f"eg3d-rlhf label add-annotator NAME --db={work.database}")
        name = campaign or work.campaign
        stored = store.campaign(name)
        if stored is None:
            request = request_of(work, name, pairs or assets)
            store.create_campaign(*launch.plan_campaign(store, request, click.echo))
            stored = store.campaign(name)
            assert stored is not None
        elif pairs is not None and pairs != stored.settings.extra[launch.FLAGS]["pairs"]:
            asked = f"{stored.settings.extra[launch.FLAGS]['pairs']}, as campaign {name!r} was planned"
            raise ValueError(f"--pairs: expected {asked}, got {pairs}. Leave it out, or --set campaign=NAME.")
        answered = sum(1 for _ in store.judgements(name))
        click.echo(f"{stored.pairs} pairs, about {duration(SECONDS * stored.pairs)} at {SECONDS} s each; {answered} answers so far")
        launch.serve_campaign(store, work.database, name, flags, lambda address: [
            f"label at {address}  (Ctrl-C stops)", f"next: eg3d-rlhf flow tune {folder}"
        ], "answer")  # fmt: skip


def request_of(work: Work, name: str, pairs: int) -> launch.Request:
    """A campaign on what was drawn, as the labelling tool plans it."""
    settings = launch.filled(dict.fromkeys(launch.SETTINGS), CampaignSettings) | launch.ASKED
    pairing = PairingOptions(pairs=pairs, seed=work.seed, strategy="random")
    assets = str(work.drawn().resolve())
    return launch.Request(
        name=name, network=None, after=None, pairing=pairing, settings=settings, assets=assets, up=work.up, lenient=True
    )


def duration(seconds: float) -> str:
    """In words.

    >>> duration(5400), duration(300)
    ('1 h 30 min', '5 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
