"""Jobs that measure what tuning changed: `report evaluate`, `attribute`, `embed`, `images` and `method`."""

import functools
import html
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.evaluation.attribution.settings import BOXES, HEAD, LANDMARKS, METHODS, PEOPLE, Settings
from eg3d_rlhf.evaluation.comparison_sources import Sources
from eg3d_rlhf.modes.shared_flags import PATH, count_option, print_json, rare_option, shared
from training.progress import tqdm
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.evaluation.attribution.attribution_study import Study

_rare_how_option = functools.partial(option, group="How", rare=True)


def _keep_summary(out: Path, words: list[str]) -> None:
    """Write the sentences of the summary as a text file."""
    write_atomic(out / "summary.txt", ("\n".join(words) + "\n").encode())


@click.command("evaluate", cls=GroupedCommand, job="report evaluate")
@shared(
    "before after run control reward-ckpt heldout-reward n",
    "data",
    run="Run folder with snapshots, for plots over training.",
    reward_ckpt="Reward that was used in tuning.",
    data="Dataset that image distances are measured to.",
)
@rare_option(
    "--inception", type=PATH, help="TorchScript detector, called as net(uint8 images, return_features=True)."
)
@rare_option(
    "--lpips",
    type=PATH,
    help="TorchScript distance f(a, b) of image batches in [-1, 1]; without it, LPIPS is not measured.",
)
@rare_option(
    "--identity",
    type=PATH,
    help="TorchScript embedding of image batches in [-1, 1]; without it, identity is not measured.",
)
@option(
    "--only",
    group="Run",
    metavar="KEYS",
    show_default="all",
    help="Parts of the report, comma-separated; --dry-run lists them.",
)
@shared(
    "outdir device dry-run",
    "psi seed images batch",
    outdir={"default": "runs/reports/evaluate"},
    dry_run="Print the resolved settings and parts as JSON and stop.",
)
def evaluate(outdir, only, dry_run, device, **sources) -> None:
    """Measure what tuning changed and whether it improved: compare a generator before and after on held-out
    latents.

    With no options: the bundled generator against the newest tuned run in runs/, and the lambda_r = 0 run of
    the same settings if there is one. Writes one self-contained page with every figure, its data and a
    summary in words. A second call computes only missing parts.

    \b
    Example:
        python tools/evaluate.py --only=reward-shift,over-optimisation --n=16
    """
    from eg3d_rlhf.evaluation import comparison_page
    from eg3d_rlhf.evaluation.comparison import load_comparison
    from eg3d_rlhf.experiments import pages
    from eg3d_rlhf.experiments.pages import write_page

    c = load_comparison(Sources(device=choose_device(device), **sources))
    parts = comparison_page.select(c, only)
    if dry_run:
        more = {
            name: getattr(c, name) and str(getattr(c, name))
            for name in ("run", "control_run", "inception", "lpips", "identity")
        }
        more |= {
            "heldout_reward": c.held_out_hash or None,
            "mirror": c.mirror,
            "images": c.images,
            "outdir": str(outdir),
        }
        print_json({**c.resolved(), **more, "parts": [job.key for job in parts]})
        return
    comparison_page.check_files(c)
    findings = pages.run(parts, outdir)
    words = comparison_page.summary(c, findings)
    _keep_summary(outdir, words)
    page = write_page(
        outdir / "index.html", comparison_page.TITLE, comparison_page.introduction(c), parts, findings, words
    )
    click.echo("\n".join(pages.first_sentences(parts, findings)))
    click.echo(
        f"\nWritten to {page.parent}: {page.name} (open it in a browser), summary.txt, figures/, data/"
    )


def attribution_introduction(study: "Study") -> str:
    """Describe what the attribution compares, for the top of its page."""
    c = study.c
    return (
        f"The same held-out latents before ({c.before.path.name}) and after tuning ({c.after.path.name}). A"
        " coalition's value is the reward of the original slab with the coalition's regions replaced by the"
        " tuned slab's, each slab on its own normalised scale."
    )


def attribution_summary(findings) -> list[str]:
    """Collect the main sentences of the findings, with the limit of what they show."""
    says = [findings["shapley"].says[0], *findings["shapley"].says[1:2], findings["redrawn-reward"].says[0]]
    return [
        *says,
        (
            "These results hold for this reward and these latents. Whether people see the same differences"
            " was not measured."
        ),
    ]


def viewer(out: Path) -> str:
    """Return the interactive surface as an HTML frame for the page; empty if it was not made."""
    from eg3d_rlhf.evaluation.attribution.attribution_report import PAGE

    path = out / "data" / PAGE
    if not path.is_file() or not path.stat().st_size:
        return ""
    # escaped, because the whole page becomes an attribute of the frame
    frame = html.escape(path.read_text())
    return (
        '<section id="turn"><h2>Turn the surface</h2><iframe title="Attribution on the surface"'
        f' srcdoc="{frame}"></iframe></section>'
    )


@click.command("attribute", cls=GroupedCommand, job="report attribute")
@shared("before after run reward-ckpt", "data", reward_ckpt="Reward whose change is attributed to regions.")
@option(
    "--regions",
    group="Regions",
    metavar="people|boxes|landmarks|head|FILE",
    show_default="people for heads of people, landmarks with --landmarks, else boxes",
    help=(
        "people: parts of the ground-truth head; boxes: fixed boxes; landmarks: boxes around landmarks;"
        " head: all in eight"
        " parts around landmarks; FILE: a label volume (.npy, with names in the .json beside it)."
    ),
)
@rare_option("--landmarks", type=PATH, help="JSON file with 98 WFLW landmarks in the frontal view.")
@option(
    "--method",
    group="How",
    type=click.Choice(METHODS),
    default="exact",
    help="Method that computes the Shapley values.",
)
@_rare_how_option(
    "--permutations",
    default=Settings.permutations,
    type=click.IntRange(min=2),
    help="Number of random orders of regions for the sampled methods.",
)
@_rare_how_option(
    "--steps",
    default=Settings.steps,
    type=click.IntRange(min=2),
    help="Initial number of steps of Integrated Gradients; it is doubled until the gap is small.",
)
@_rare_how_option(
    "--most-steps",
    default=Settings.most_steps,
    type=click.IntRange(min=2),
    help="Largest number of steps of Integrated Gradients.",
)
@_rare_how_option(
    "--gap-bound",
    default=Settings.gap_bound,
    type=click.FloatRange(min=0, min_open=True),
    help="Largest allowed efficiency gap, as a share of the change.",
)
@_rare_how_option(
    "--randomisations",
    default=Settings.randomisations,
    type=click.IntRange(min=2),
    help="Number of rewards with randomised weights, as controls.",
)
@_rare_how_option(
    "--checked",
    default=Settings.checked,
    type=click.IntRange(min=1),
    help="Number of latents for the rewards with randomised weights.",
)
@shared(
    "n outdir device dry-run",
    "psi seed batch",
    n={"default": 6, "type": click.IntRange(min=2)},
    outdir={"default": "runs/reports/attribute"},
    batch="Density slabs per batch; less needs less memory.",
    psi={"default": None, "show_default": f"1 for heads of people, else {Sources.psi}"},
)
def attribute(outdir, dry_run, device, regions, landmarks, method, **flags) -> None:
    """Attribute the change of the reward to regions of the face (Shapley values), to see why the reward
    prefers the tuned shapes.

    With no options: the bundled generator against the newest tuned run in runs/. The value of a set of
    regions is the reward of the original slab with those regions replaced by the tuned slab's. Renders the
    regions on a mesh first, then computes Shapley values, Integrated Gradients, occlusion and a noise
    baseline, compares them with each other and with rewards of random weights, and shows single voxels on the
    surface.

    \b
    Example:
        python tools/attribute.py --after=runs/00000-heads64-sigma-lambda10 --n=4
    """
    from eg3d_rlhf.evaluation.attribution import attribution_report as attribution
    from eg3d_rlhf.evaluation.attribution.attribution_report import PAGE
    from eg3d_rlhf.evaluation.attribution.attribution_study import Study
    from eg3d_rlhf.evaluation.comparison import load_comparison
    from eg3d_rlhf.experiments import pages
    from eg3d_rlhf.experiments.pages import write_page

    names = ("permutations", "steps", "most_steps", "gap_bound", "randomisations", "checked")
    # settings of the attribution, apart from those of the comparison
    how = {"method": method, "landmarks": landmarks, **{name: flags.pop(name) for name in names}}
    # checks the flags before the networks are loaded
    Settings(**{**how, "regions": LANDMARKS if landmarks else BOXES})
    # None: chosen below, when the kind of generator is known
    psi = flags.pop("psi")
    c = load_comparison(
        Sources(device=choose_device(device), **flags, **({} if psi is None else {"psi": psi}))
    )
    # the ground truth of a latent exists only without truncation
    if c.of_people and psi is None:
        c = replace(c, psi=1.0)
    regions = regions or (
        LANDMARKS if landmarks is not None else PEOPLE if c.of_people and c.psi == 1 else BOXES
    )
    chosen = Settings(
        regions=regions if regions in (BOXES, LANDMARKS, HEAD, PEOPLE) else Path(regions), **how
    )
    study = Study(c, chosen, progress=tqdm.write)
    if dry_run:
        paths = {
            "regions": str(chosen.regions),
            "landmarks": landmarks and str(landmarks),
            "outdir": str(outdir),
        }
        print_json({**c.resolved(), **vars(chosen), **paths})
        return
    parts = attribution.jobs(study)
    # the regions come first, so that the user can check them while the attribution is computed
    findings = pages.run(parts[:1], outdir)
    for name in findings["regions"].images.values():
        click.echo(f"The regions are shown in {outdir / 'data' / name}. The attribution follows.")
    findings |= pages.run(parts[1:], outdir)
    words = attribution_summary(findings)
    _keep_summary(outdir, words)
    page = write_page(
        outdir / "index.html",
        attribution.TITLE,
        attribution_introduction(study),
        parts,
        findings,
        words,
        viewer(outdir),
    )
    data = findings["shapley"].data
    click.echo(f"\n{'region':<18} {'Shapley value':>14}  95 % interval")
    for name, mean in sorted(
        zip(data["names"], data["means"], strict=True), key=lambda pair: -pair[1]["mean"]
    ):
        click.echo(f"{name:<18} {mean['mean']:>+14.4f}  [{mean['lo']:+.4f}, {mean['hi']:+.4f}]")
    # efficiency: the Shapley values add up to the change of the reward
    total = data["difference"]["mean"]
    surface_file = f", data/{PAGE}" if "surface" in findings else ""
    click.echo(
        f"{'sum':<18} {total:>+14.4f}  largest efficiency gap {data['largest_relative_gap']:.1e} of the"
        " difference\n"
    )
    click.echo("\n".join(pages.first_sentences(parts, findings)))
    click.echo(
        f"\nWritten to {page.parent}: {page.name} (open it in a browser), summary.txt, figures/,"
        f" data/{surface_file}"
    )


@click.command("embed", cls=GroupedCommand, job="report embed")
@shared(
    "before after control reward-ckpt n outdir device dry-run",
    "psi seed batch",
    outdir={"default": "runs/reports/embed"},
    after={"show_default": "the newest tuned run in runs/"},
    reward_ckpt="Reward whose global feature is embedded.",
    control="Control: the same run with --lambda-r=0, for the test of separability.",
    n="Number of latents; each is used in both networks.",
    seed="Random seed of the held-out latents and of UMAP.",
)
def embed(outdir, dry_run, device, **sources) -> None:
    """Plot where the reward places tuned samples: a map of its global feature before and after tuning, which
    shows the shape of every point.

    With no options: the bundled generator against the newest tuned run in runs/. Writes one self-contained
    page: UMAP and principal axes, rank correlation of the reward with the main axis, a test of separability,
    and an interactive map.

    \b
    Example:
        eg3d-rlhf report embed --after=runs/00000-heads64-synthetic-people64-batch4-gamma0.3-sigma-lambda10
    """
    from eg3d_rlhf.evaluation import embedding
    from eg3d_rlhf.evaluation.comparison import load_comparison

    c = load_comparison(Sources(device=choose_device(device), **sources))
    if dry_run:
        print_json({**c.resolved(), "umap": embedding.umap_version(), "outdir": str(outdir)})
        return
    findings = embedding.write(c, outdir)
    # rank correlation of the reward with each axis
    for row in findings[embedding.MAP].data["ranks"]:
        rho = (
            "undefined: constant"
            # undefined if all scores or all coordinates are equal
            if row["spearman"] is None
            else f"{row['spearman']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]"
        )
        click.echo(f"reward with the {row['axis']:<36}  {rho}")
    for row in findings[embedding.APART].rows:
        click.echo(
            f"before and {row['role']:<8} same-network neighbours      {row['share']:.1%}, p = {row['p']:.2g}"
        )
    click.echo(f"\nWritten to {outdir}: index.html (open it in a browser), figures/, data/")


@click.command("images", cls=GroupedCommand, job="report images")
@shared(
    "before run reward-ckpt outdir device dry-run",
    run={"show_default": "the newest in runs/"},
    outdir={"show_default": "the run folder"},
)
@count_option(
    "--pairs",
    help=(
        "Instead write pairs.png: this many pairs seen from the back, in random order, for people to"
        " choose (synthetic"
        " heads only)."
    ),
)
def images(outdir, device, dry_run, pairs, **sources) -> None:
    """Render the images of a finished reward run again, without the evaluation: comparison.png,
    turntable.webp and meshes.

    Also prints the median change of the surface, which summary.json contains.

    \b
    Example:
        eg3d-rlhf report images --run=runs/00000-heads64-synthetic-people64-batch4-gamma0.3-sigma-lambda10
    """
    from eg3d_rlhf.evaluation.comparison import load_comparison
    from eg3d_rlhf.evaluation.run_images import CHANGED, PAIRS, pairs_sheet, surface_change, write_pictures
    from eg3d_rlhf.experiments.media.rendering import png

    c = load_comparison(Sources(device=choose_device(device), **sources))
    # by default the images replace those of the run
    folder = outdir or c.run
    assert folder is not None
    if dry_run:
        print_json({**c.resolved(), "outdir": str(folder)})
        return
    # nothing but the sheet of pairs is written
    if pairs is not None:
        write_atomic(folder / PAIRS, png(pairs_sheet(c, pairs)))
        click.echo(f"Written to {folder}: {PAIRS}")
        return
    written = write_pictures(c, folder)
    click.echo(json.dumps(surface_change(c, EVALUATION.take(CHANGED))))
    click.echo(f"Written to {folder}: {', '.join(written)}")


@click.command("method", cls=GroupedCommand)
@shared(
    "run out",
    run={
        "type": click.Path(path_type=Path, exists=True, file_okay=False),
        "required": True,
        "help": "Folder of a finished run.",
    },
    out={"metavar": "FILE", "type": PATH, "required": True, "help": "Image to write (.png or .svg)."},
)
def method(run: Path, out: Path) -> None:
    """Draw the method as one figure with four boxes, from real data: labels, reward, tuning, report.

    Uses the bundled generator and reward and a finished run of `train.py --reward=sigma`.

    \b
    Example:
        eg3d-rlhf report method --run=runs/00000-heads64-sigma-lambda10 --out=out/method.png
    """
    from eg3d_rlhf.evaluation.method_figure import draw_method

    draw_method(run, out)
    click.echo(f"{out}")
