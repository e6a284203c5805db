"""Why does the reward like the tuned shapes? Divides the change of the reward among the regions of the face.

With no options: the bundled generator against the newest tuned run in runs/. The value of a set of regions is the reward of the original
slab with those regions replaced by the tuned slab's. Draws the regions on a mesh first, then computes Shapley values, Integrated Gradients,
occlusion and a noise baseline, compares them with each other and with rewards of random weights, and shows single voxels on the surface.

\b
Example:
    python tools/attribute.py --after=runs/00000-heads64-synthetic-heads64-batch8-gamma0.3-sigma-lambda10 --n=4
"""

import html
import json
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.evaluation import flags
from eg3d_rlhf.evaluation.attribution import report
from eg3d_rlhf.evaluation.attribution.cross_checks import BOUND, MOST_STEPS, STEPS
from eg3d_rlhf.evaluation.attribution.shapley import METHODS
from eg3d_rlhf.evaluation.attribution.study import BOXES, HEAD, LANDMARKS, Settings, Study
from eg3d_rlhf.evaluation.attribution.surface import PAGE
from eg3d_rlhf.evaluation.comparison import Sources, load_comparison
from eg3d_rlhf.experiments import jobs as running
from eg3d_rlhf.experiments.page import write_page
from training.storage import write_atomic


def introduction(study: Study) -> str:
    """What is attributed, in a paragraph."""
    c = study.c
    return (
        f"The same held-out latents before ({c.before.path.name}) and after tuning ({c.after.path.name}). A coalition's value is the "
        "reward of the original slab with the coalition's regions replaced by the tuned slab's, each slab on its own normalised scale."
    )


def summary(findings) -> list[str]:
    """What stands first."""
    says = [findings["shapley"].says[0], *findings["shapley"].says[1:2], findings["redrawn-reward"].says[0]]
    return [*says, "These are statements about this reward and these latents; whether people see the same, nobody was asked."]


def viewer(out: Path) -> str:
    """The interactive surface as a frame of the page."""
    path = out / "data" / PAGE
    if not path.is_file() or not path.stat().st_size:
        return ""
    frame = html.escape(path.read_text())
    return f'<section id="turn"><h2>Turn the surface</h2><iframe title="Attribution on the surface" srcdoc="{frame}"></iframe></section>'


@click.command(cls=GroupedCommand, help=__doc__)
@flags.shared("before after run reward-ckpt data", reward_ckpt="Reward whose change is divided.",
              data="Procedural heads (synthetic:...) bring their own landmarks.")
@option("--regions", group="Regions", metavar="boxes|landmarks|head|FILE", default=None,
        show_default="landmarks for procedural heads or with --landmarks, else boxes",
        help="Fixed boxes, boxes about landmarks, the whole head in eight parts about landmarks, or a label volume (.npy, .npz; names in "
             "the .json beside it).")
@option("--landmarks", group="Regions", metavar="FILE", type=flags.PATH, default=None, show_default="those of the procedural heads",
        help="JSON of 98 WFLW points in the frontal view.")
@option("--method", group="How", type=click.Choice(METHODS), default="exact", help="How Shapley values are computed.")
@option("--permutations", group="How", metavar="INT", type=click.IntRange(min=2), default=64, help="Orders of the sampled methods.")
@option("--steps", group="How", metavar="INT", type=click.IntRange(min=2), default=STEPS,
        help="Steps of Integrated Gradients at first; they double while the gap is above 1 %.")
@option("--most-steps", group="How", metavar="INT", type=click.IntRange(min=2), default=MOST_STEPS, help="Where the doubling ends.")
@option("--gap-bound", group="How", metavar="SHARE", type=click.FloatRange(min=0, min_open=True), default=BOUND,
        help="Refuse a larger efficiency gap, as a share of the reward difference.")
@option("--draws", group="How", metavar="INT", type=click.IntRange(min=2), default=8, help="Rewards with re-drawn weights.")
@option("--checked", group="How", metavar="LATENTS", type=click.IntRange(min=1), default=2, help="Latents that those rewards see.")
@flags.shared("psi n seed out fresh batch device dry-run", n={"default": 6, "type": click.IntRange(min=2)},
              out={"default": "runs/reports/attribute"}, batch="Slabs at once; bounds memory.")
def main(out, fresh, dry_run, device, regions, landmarks, method, permutations, steps, most_steps, gap_bound, draws, checked, **what):
    how = {"method": method, "permutations": permutations, "steps": steps, "most_steps": most_steps, "gap_bound": gap_bound, "draws": draws,
           "checked": checked, "landmarks": landmarks}
    Settings(**{**how, "regions": LANDMARKS if landmarks else BOXES})  # a wrong flag is named before networks are loaded
    c = load_comparison(Sources(device=choose_device(device), **what))
    regions = regions or (LANDMARKS if landmarks is not None or c.synthetic else BOXES)
    settings = Settings(regions=regions if regions in (BOXES, LANDMARKS, HEAD) else Path(regions), **how)
    study = Study(c, settings, progress=tqdm.write)
    if dry_run:
        paths = {"regions": str(settings.regions), "landmarks": landmarks and str(landmarks), "out": str(out)}
        click.echo(json.dumps({**c.resolved(), **vars(settings), **paths}, indent=1))
        return
    parts = report.jobs(study)
    findings = running.run(parts[:1], out, fresh=fresh)
    for name in findings["regions"].pictures.values():
        click.echo(f"The regions are drawn in {out / 'data' / name}; the attribution follows.")
    findings |= running.run(parts[1:], out, fresh=fresh)
    words = summary(findings)
    write_atomic(out / "summary.txt", ("\n".join(words) + "\n").encode())
    page = write_page(out / "index.html", report.TITLE, introduction(study), parts, findings, words, viewer(out))
    data = findings["shapley"].data
    click.echo(f"\n{'region':<18} {'Shapley value':>14}  95 % interval")
    for name, mean in sorted(zip(data["names"], data["means"], strict=True), key=lambda pair: -pair[1]["mean"]):
        click.echo(f"{name:<18} {mean['mean']:>+14.4f}  [{mean['lo']:+.4f}, {mean['hi']:+.4f}]")
    total, turned = data["difference"]["mean"], f", data/{PAGE}" if "surface" in findings else ""
    click.echo(f"{'sum':<18} {total:>+14.4f}  largest efficiency gap {data['largest_relative_gap']:.1e} of the difference\n")
    click.echo("\n".join(running.first_sentences(parts, findings)))
    click.echo(f"\nWritten to {page.parent}: {page.name} (open it in a browser), summary.txt, figures/, data/{turned}")


if __name__ == "__main__":
    main()
