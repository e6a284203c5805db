"""Jobs that measure what tuning changed: `report evaluate`, `attribute`, `embed`, `images` and `method`.

They compare a generator before and after tuning on the same held-out latents.
"""

import functools
import html
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.core.input_paths import check_torchscript_file
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.evaluation.attribution.settings import BOXES, HEAD, LANDMARKS, METHODS, PEOPLE, Settings
from eg3d_rlhf.evaluation.comparison_sources import Sources
from eg3d_rlhf.modes.shared_flags import PATH, count_option, print_json, rare_option, shared
from training.progress import tqdm
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.evaluation.attribution.attribution_study import Study

_rare_how_option = functools.partial(option, group="How", rare=True)


def _keep_summary(report_folder: Path, sentences: list[str]) -> None:
    """Write the sentences of a report's summary to summary.txt, one per line.

    Args:
        report_folder: folder of the report.
        sentences: sentences of the summary.
    """
    write_atomic(report_folder / "summary.txt", ("\n".join(sentences) + "\n").encode())


@click.command("evaluate", cls=GroupedCommand, job="report evaluate")
@shared(
    "before after run control reward-ckpt heldout-reward n",
    "data",
    run="Run folder with snapshots, for plots over training.",
    reward_ckpt="Reward that was used in tuning.",
    data="Dataset to which the image distances (FID, KID) are measured.",
)
@rare_option(
    "--inception",
    type=PATH,
    check=check_torchscript_file,
    show_default="the bundled feature network",
    help=(
        "TorchScript file of the Inception network from which FID and KID are computed; it is called as"
        " net(uint8 images, return_features=True)."
    ),
)
@rare_option(
    "--lpips",
    type=PATH,
    check=check_torchscript_file,
    show_default="none; LPIPS is not measured",
    help="TorchScript file of a perceptual distance (LPIPS) f(a, b) of two image batches in [-1, 1].",
)
@rare_option(
    "--identity",
    type=PATH,
    check=check_torchscript_file,
    show_default="none; identity is not measured",
    help=(
        "TorchScript file of a face embedding of image batches in [-1, 1], by which the similarity of the"
        " identity is measured."
    ),
)
@option(
    "--only",
    group="Run",
    metavar="KEYS",
    show_default="all",
    help="Names of the parts of the report to write, separated by commas; --dry-run lists the names.",
)
@shared(
    "outdir device dry-run",
    "psi level seed images batch",
    outdir={"default": "runs/reports/evaluate"},
    dry_run="Print the resolved settings and parts as JSON and stop.",
)
def evaluate(outdir, only, dry_run, device, **sources) -> None:
    """Measure what tuning changed and whether it improved the generator, by comparing both generators on the
    same held-out latents.

    Without options, the newest tuned run in runs/ is compared with the generator from which it began, and
    with its control, the run with lambda_r = 0 and otherwise equal settings, if there is one. The command
    writes one page with all plots, their data and a summary. When it is called again, only missing parts are
    computed.

    \b
    Example:
        python tools/evaluate.py --only=reward-shift,over-optimisation --n=16
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation import comparison_page
    from eg3d_rlhf.evaluation.comparison import load_comparison
    from eg3d_rlhf.experiments import pages
    from eg3d_rlhf.experiments.pages import write_page

    comparison = load_comparison(Sources(device=choose_device(device), **sources))
    # raises ValueError for an unknown name in --only
    report_parts = comparison_page.select_jobs(comparison, only)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        # paths as texts for JSON; None stays None
        source_paths = {
            name: getattr(comparison, name) and str(getattr(comparison, name))
            for name in ("run", "control_run", "inception", "lpips", "identity")
        }
        resolved_settings = {
            **source_paths,
            "heldout_reward": comparison.held_out_hash or None,
            "mirror": comparison.mirror,
            "images": comparison.images,
            "outdir": str(outdir),
        }
        print_json(
            {
                **comparison.resolved(),
                **resolved_settings,
                "parts": [report_part.key for report_part in report_parts],
            }
        )
        return
    comparison.warn_without_surface()
    # Missing files are reported before the first part is computed.
    comparison_page.check_files(comparison)
    findings = pages.run(report_parts, outdir)
    # The summary uses only parts that were computed.
    sentences = comparison_page.list_conclusions(comparison, findings)
    _keep_summary(outdir, sentences)
    page_path = write_page(
        outdir / "index.html",
        comparison_page.TITLE,
        comparison_page.introduction(comparison),
        report_parts,
        findings,
        sentences,
    )
    click.echo("\n".join(pages.first_sentences(report_parts, findings)))
    click.echo(
        f"\nWritten to {page_path.parent}: {page_path.name} (open it in a browser), summary.txt, figures/,"
        " data/"
    )


def attribution_introduction(study: "Study") -> str:
    """Return the introduction of the attribution's page: the compared networks and the value function.

    A slab is a cropped grid of densities. A coalition is a set of regions (Shapley values).
    """
    comparison = study.comparison
    return (
        f"The same held-out latents before ({comparison.before.path.name}) and after tuning"
        f" ({comparison.after.path.name}). The reward reads a slab, a cropped grid of densities. The value of"
        " a set of regions (a coalition) is the reward of the original slab in which these regions are"
        " replaced by the regions of the tuned slab. Each slab is normalised by itself before."
    )


def attribution_summary(findings) -> list[str]:
    """Return the sentences of the summary: the main results, and a sentence on what they do not show.

    Args:
        findings: findings of the attribution by name.
    """
    # The finding "shapley" has one or two main sentences at its start: the slice [1:2] is empty if there is
    # only one.
    main_sentences = [
        findings["shapley"].says[0],
        *findings["shapley"].says[1:2],
        findings["redrawn-reward"].says[0],
    ]
    return [
        *main_sentences,
        (
            "These results hold for this reward and these latents. Whether people see the same differences"
            " was not measured."
        ),
    ]


def viewer(report_folder: Path) -> str:
    """Return the interactive view of the surface as an HTML frame for the page.

    The result is empty if the view was not made.

    Args:
        report_folder: folder of the report.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.evaluation.attribution.attribution_report import PAGE

    view_file = report_folder / "data" / PAGE
    if not view_file.is_file() or not view_file.stat().st_size:
        # The page then has no section for the surface.
        return ""
    # Escaped, because the content of the file becomes the attribute srcdoc of the frame.
    frame_html = html.escape(view_file.read_text())
    return (
        '<section id="turn"><h2>Turn the surface</h2><iframe title="Attribution on the surface"'
        f' srcdoc="{frame_html}"></iframe></section>'
    )


@click.command("attribute", cls=GroupedCommand, job="report attribute")
@shared("before after run reward-ckpt", "data", reward_ckpt="Reward whose change is attributed to regions.")
@option(
    "--regions",
    group="Regions",
    metavar="people|boxes|landmarks|head|FILE",
    show_default="landmarks with --landmarks, else people for synthetic heads, else boxes",
    help=(
        "Regions of the shape to which the change is attributed. people: parts of the ground-truth synthetic"
        " head; boxes: fixed boxes; landmarks: boxes around facial landmarks; head: eight parts around"
        " landmarks that fill the density grid of the reward; FILE: a label volume (.npy, with names in a"
        " .json beside it)."
    ),
)
# WFLW is a dataset of human faces with 98 landmarks.
@rare_option(
    "--landmarks", type=PATH, help="JSON file with the 98 facial landmarks of WFLW in the frontal view."
)
@option(
    "--method",
    group="How",
    type=click.Choice(METHODS),
    default="exact",
    help=(
        "Method by which the Shapley values of the regions are computed: from all sets of regions (exact),"
        " from random orders of the regions (permutation), or from random orders and their reverses"
        " (antithetic)."
    ),
)
@_rare_how_option(
    # Settings of the attribution methods, whose defaults suit most cases.
    "--permutations",
    default=Settings.permutations,
    type=click.IntRange(min=2),
    help="Number of random orders of the regions for methods that estimate Shapley values from samples.",
)
@_rare_how_option(
    "--steps",
    default=Settings.steps,
    type=click.IntRange(min=2),
    help=(
        "Initial number of steps of Integrated Gradients. It is doubled until the efficiency gap is at most"
        " gap_bound."
    ),
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
    help=(
        "Largest allowed efficiency gap, the difference between the sum of the attributions and the change of"
        " the reward, as a share of the change."
    ),
)
@_rare_how_option(
    "--randomisations",
    default=Settings.randomisations,
    type=click.IntRange(min=2),
    help=(
        "Number of controls: copies of the reward with randomised weights, whose attributions are computed,"
        " too."
    ),
)
@_rare_how_option(
    "--checked",
    default=Settings.checked,
    type=click.IntRange(min=1),
    help="Number of latents for which the rewards with randomised weights are attributed.",
)
@shared(
    "n outdir device dry-run",
    "psi level seed batch",
    # an interval needs at least two latents
    n={"default": 6, "type": click.IntRange(min=2)},
    outdir={"default": "runs/reports/attribute"},
    batch="Number of density slabs per batch; a smaller batch needs less memory.",
    psi={"default": None, "show_default": f"1 for synthetic heads, else {Sources.psi}"},
)
def attribute(outdir, dry_run, device, regions, landmarks, method, **flags) -> None:
    """Attribute the change of the reward to regions of the face with Shapley values. The result shows which
    regions make the reward prefer the tuned shapes.

    Without options, the newest tuned run in runs/ is compared with the generator from which it began. The
    value of a set of regions is the reward of the original density slab in which these regions are replaced
    by the regions of the tuned slab. The command first renders the regions on a mesh. Then it computes
    Shapley values, Integrated Gradients, occlusion and a noise baseline, and compares them with each
    other and with the attributions of rewards with random weights. The attributions of single voxels are
    shown on the surface.

    \b
    Example:
        python tools/attribute.py --after=runs/00000-heads64-sigma-lambda10 --n=4
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation.attribution import attribution_report as attribution
    from eg3d_rlhf.evaluation.attribution.attribution_report import PAGE
    from eg3d_rlhf.evaluation.attribution.attribution_study import Study
    from eg3d_rlhf.evaluation.comparison import load_comparison
    from eg3d_rlhf.experiments import pages
    from eg3d_rlhf.experiments.pages import write_page

    setting_names = ("permutations", "steps", "most_steps", "gap_bound", "randomisations", "checked")
    # settings of the attribution itself; the other flags belong to the comparison
    # `pop` removes these flags, so that `Sources` gets only its own
    method_settings = {
        "method": method,
        "landmarks": landmarks,
        **{name: flags.pop(name) for name in setting_names},
    }
    # Raises ValueError for wrong values before the networks are loaded; the result is not used.
    Settings(**{**method_settings, "regions": LANDMARKS if landmarks else BOXES})
    # None: chosen below, because the default depends on the generator
    psi = flags.pop("psi")
    comparison = load_comparison(
        Sources(device=choose_device(device), **flags, **({} if psi is None else {"psi": psi}))
    )
    # A latent has a ground-truth head only without truncation, hence psi = 1 for synthetic heads.
    if comparison.of_people and psi is None:
        comparison = replace(comparison, psi=1.0)
    regions = regions or (
        LANDMARKS
        if landmarks is not None
        else PEOPLE
        if comparison.of_people and comparison.psi == 1
        else BOXES
    )
    settings = Settings(
        regions=regions if regions in (BOXES, LANDMARKS, HEAD, PEOPLE) else Path(regions), **method_settings
    )
    if not dry_run:
        comparison.warn_without_surface()
    study = Study(comparison, settings, progress=tqdm.write)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        path_texts = {
            "regions": str(settings.regions),
            "landmarks": landmarks and str(landmarks),
            "outdir": str(outdir),
        }
        print_json({**comparison.resolved(), **vars(settings), **path_texts})
        return
    report_parts = attribution.jobs(study)
    # The first part renders the regions, so that the user can check them while the attribution is computed.
    findings = pages.run(report_parts[:1], outdir)
    for name in findings["regions"].images.values():
        click.echo(f"The regions are shown in {outdir / 'data' / name}. The attribution follows.")
    findings |= pages.run(report_parts[1:], outdir)
    sentences = attribution_summary(findings)
    _keep_summary(outdir, sentences)
    page_path = write_page(
        outdir / "index.html",
        attribution.TITLE,
        attribution_introduction(study),
        report_parts,
        findings,
        sentences,
        viewer(outdir),
    )
    # The table lists the regions with the largest Shapley values first.
    shapley_data = findings["shapley"].data
    click.echo(f"\n{'region':<18} {'Shapley value':>14}  95 % interval")
    for name, region_mean in sorted(
        zip(shapley_data["names"], shapley_data["means"], strict=True), key=lambda pair: -pair[1]["mean"]
    ):
        click.echo(
            f"{name:<18} {region_mean['mean']:>+14.4f}  [{region_mean['lo']:+.4f}, {region_mean['hi']:+.4f}]"
        )
    # By the efficiency axiom, the Shapley values add up to the change of the reward.
    reward_change = shapley_data["difference"]["mean"]
    surface_text = f", data/{PAGE}" if "surface" in findings else ""
    click.echo(
        f"{'sum':<18} {reward_change:>+14.4f}  largest efficiency gap"
        f" {shapley_data['largest_relative_gap']:.1e} of the difference\n"
    )
    click.echo("\n".join(pages.first_sentences(report_parts, findings)))
    click.echo(
        f"\nWritten to {page_path.parent}: {page_path.name} (open it in a browser), summary.txt, figures/,"
        f" data/{surface_text}"
    )


@click.command("embed", cls=GroupedCommand, job="report embed")
@shared(
    "before after control reward-ckpt n outdir device dry-run",
    "psi level seed batch",
    outdir={"default": "runs/reports/embed"},
    after={"show_default": "the newest tuned run in runs/"},
    reward_ckpt="Reward whose global feature vector is embedded.",
    control="Run with --lambda-r=0 and otherwise equal settings, the control of the test of separability.",
    n="Number of latents; each latent is sampled with both generators.",
    seed="Random seed of the held-out latents and of UMAP.",
)
def embed(outdir, dry_run, device, **sources) -> None:
    """Plot samples before and after tuning in the feature space of the reward. The interactive map shows the
    shape of each point.

    Without options, the newest tuned run in runs/ is compared with the generator from which it began. The
    command writes one page with a UMAP plot, the principal axes, the rank correlation of the reward with each
    axis, and a test of whether samples before and after tuning can be separated.

    \b
    Example:
        eg3d-rlhf report embed --after=runs/00000-heads64-synthetic-people64-batch4-gamma0.3-sigma-lambda10
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation import embedding
    from eg3d_rlhf.evaluation.comparison import load_comparison

    comparison = load_comparison(Sources(device=choose_device(device), **sources))
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        # results of UMAP differ between versions
        print_json({**comparison.resolved(), "umap": embedding.umap_version(), "outdir": str(outdir)})
        return
    comparison.warn_without_surface()
    # Computes the embedding, and writes the page and its data.
    findings = embedding.write(comparison, outdir)
    # rank correlation of the reward with each axis
    for row in findings[embedding.MAP].data["ranks"]:
        correlation_text = (
            # a rank correlation is undefined if all scores or all coordinates are equal
            "undefined: constant"
            if row["spearman"] is None
            else f"{row['spearman']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]"
        )
        click.echo(f"reward with the {row['axis']:<36}  {correlation_text}")
    for row in findings[embedding.SEPARABILITY].rows:
        click.echo(
            f"before and {row['role']:<8} same-network neighbours      {row['share']:.1%}, p = {row['p']:.2g}"
        )
    click.echo(f"\nWritten to {outdir}: index.html (open it in a browser), figures/, data/")


@click.command("images", cls=GroupedCommand, job="report images")
@shared(
    "before run reward-ckpt outdir device dry-run",
    "level",
    run={"show_default": "the newest run in runs/"},
    outdir={"show_default": "the run folder"},
)
@count_option(
    "--pairs",
    help=(
        "Write only pairs.png, with this number of pairs of synthetic heads from the back, before and after"
        " tuning in random order, so that people can choose the better head of each pair."
    ),
)
def images(outdir, device, dry_run, pairs, **sources) -> None:
    """Render the images of a finished run with a reward again: comparison.png, turntable.webp and meshes. The
    evaluation is not repeated.

    The command also prints the median change of the surface, as in summary.json.

    \b
    Example:
        eg3d-rlhf report images --run=runs/00000-heads64-synthetic-people64-batch4-gamma0.3-sigma-lambda10
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation.comparison import load_comparison
    from eg3d_rlhf.evaluation.run_images import CHANGED, PAIRS, pairs_sheet, surface_change, write_images
    from eg3d_rlhf.experiments.media.rendering import png

    comparison = load_comparison(Sources(device=choose_device(device), **sources))
    # By default, the new images replace the images in the run folder.
    image_folder = outdir or comparison.run
    assert image_folder is not None
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json({**comparison.resolved(), "outdir": str(image_folder)})
        return
    comparison.warn_without_surface()
    if pairs is not None:
        # a note below the pairs names the tuned shape of each pair
        write_atomic(image_folder / PAIRS, png(pairs_sheet(comparison, pairs)))
        click.echo(f"Written to {image_folder}: {PAIRS}")
        return
    file_names = write_images(comparison, image_folder)
    # computed on the same held-out latents as in summary.json
    click.echo(json.dumps(surface_change(comparison, EVALUATION.take(CHANGED))))
    click.echo(f"Written to {image_folder}: {', '.join(file_names)}")


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
    """Draw the method as one figure with four boxes: labels, reward, tuning and report. The boxes show
    results of the bundled generator, the bundled reward and a finished run of `train.py --reward=sigma`.

    \b
    Example:
        eg3d-rlhf report method --run=runs/00000-heads64-sigma-lambda10 --out=out/method.png
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.evaluation.method_figure import draw_method

    # Raises an error if the run lacks a file that the figure needs.
    draw_method(run, out)
    click.echo(f"{out}")
