"""Where does the reward see tuned samples? Maps its global feature before and after tuning, with the shape behind every point.

With no options: the bundled generator against the newest tuned run in runs/. Writes one self-contained page: UMAP and principal axes, rank
correlation of the reward with the main axis, a test of separability, and a map whose points show their shapes.

\b
Example:
    python tools/embed.py --after=runs/00000-heads64-synthetic-heads64-batch8-gamma0.3-sigma-lambda10
"""

import json
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device
from eg3d_rlhf.evaluation import embedding, flags
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, load_comparison
from eg3d_rlhf.experiments import jobs as running
from eg3d_rlhf.experiments.page import data_uri, points_section, write_page


def write(c: Comparison, out: Path, fresh: bool = False, quiet: bool = False) -> dict:
    """Compute what is missing and write the page; returns the findings."""
    parts = embedding.jobs(c)
    findings = running.run(parts, out, fresh=fresh, quiet=quiet)
    found, sheet = findings[embedding.MAP].data, findings[embedding.SHAPES].data
    sprite = {**sheet, "uri": data_uri((out / "data" / sheet["file"]).read_bytes(), "image/jpeg")}
    titles = {"umap": "UMAP", "principal": "principal axes"}
    chart = points_section(found["points"], [(name, titles[name]) for name in found["layouts"]], sprite)
    introduction = (
        f"The global feature of the reward {c.reward_hash[:12]} for the same {c.n} held-out latents before and after tuning. Points at the "
        "end of the page show their shapes."
    )
    words = [findings[key].says[0] for key in (embedding.MAP, embedding.APART)]
    write_page(out / "index.html", embedding.TITLE, introduction, parts[:2], findings, words, chart)
    return findings


@click.command(cls=GroupedCommand, help=__doc__)
@flags.shared("before after control reward-ckpt psi n seed out fresh batch device dry-run", out={"default": "runs/reports/embed"},
              after={"show_default": "the newest tuned run in runs/"}, reward_ckpt="Reward whose feature is mapped.",
              control="The same run with --lambda-r=0, for the test of separability.",
              n="Latents, each in both networks.", seed="Other held-out latents, and UMAP, per seed.")
def main(out, fresh, dry_run, device, **sources) -> None:
    c = load_comparison(Sources(device=choose_device(device), **sources))
    if dry_run:
        click.echo(json.dumps({**c.resolved(), "umap": embedding.umap_version(), "out": str(out)}, indent=1))
        return
    findings = write(c, out, fresh)
    for row in findings[embedding.MAP].data["ranks"]:
        rho = "none: constant" if row["spearman"] is None else f"{row['spearman']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]"
        click.echo(f"reward with the {row['axis']:<36}  {rho}")
    for row in findings[embedding.APART].rows:
        click.echo(f"before and {row['role']:<8} same-network neighbours      {row['share']:.1%}, p = {row['p']:.2g}")
    click.echo(f"\nWritten to {out}: index.html (open it in a browser), figures/, data/")


if __name__ == "__main__":
    main()
