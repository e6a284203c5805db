"""What did tuning change, and did it get better? Compares a generator before and after tuning on held-out latents.

With no options: the bundled generator against the newest tuned run in runs/, with the lambda_r = 0 run of the same settings where there is
one. Writes one self-contained page with every figure, its data and a summary in words. A second call computes only what is new.

\b
Example:
    python tools/evaluate.py --only=reward-shift,over-optimisation --n=16
"""

import json

import _repository  # noqa: F401
import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.evaluation import flags, report
from eg3d_rlhf.evaluation.comparison import Sources, load_comparison
from eg3d_rlhf.experiments import jobs as running
from eg3d_rlhf.experiments.page import write_page
from training.storage import write_atomic


@click.command(cls=GroupedCommand, help=__doc__)
@flags.shared("before after run control reward-ckpt reward-watch data", run="Run folder with snapshots, for trajectories.",
              reward_ckpt="Reward that tuned.", data="Images to measure distances to.")
@option("--inception", group="Networks of yours", metavar="FILE", type=click.Path(), default=None, show_default="the bundled features",
        help="TorchScript detector: net(uint8 images, return_features=True).")
@option("--lpips", group="Networks of yours", metavar="FILE", type=flags.PATH, default=None, show_default="LPIPS is left out",
        help="TorchScript distance f(a, b) of image batches in [-1, 1].")
@option("--identity", group="Networks of yours", metavar="FILE", type=flags.PATH, default=None, show_default="identity is left out",
        help="TorchScript embedding of image batches in [-1, 1].")
@flags.shared("psi n seed images")
@option("--only", group="Run", metavar="KEYS", default=None, show_default="all", help="Parts to make, comma-separated; see --dry-run.")
@flags.shared("out fresh batch device dry-run", out={"default": "runs/reports/evaluate"},
              dry_run="Print the resolved settings and parts as JSON and stop.")
def main(out, only, fresh, dry_run, device, **sources) -> None:
    c = load_comparison(Sources(device=choose_device(device), **sources))
    parts = report.select(c, only)
    if dry_run:
        more = {name: getattr(c, name) and str(getattr(c, name)) for name in ("run", "control_run", "inception", "lpips", "identity")}
        more |= {"reward_watch": c.held_out_hash or None, "mirror": c.mirror, "images": c.images, "out": str(out)}
        click.echo(json.dumps({**c.resolved(), **more, "parts": [job.key for job in parts]}, indent=1))
        return
    report.check_files(c)
    findings = running.run(parts, out, fresh=fresh)
    words = report.summary(c, findings)
    write_atomic(out / "summary.txt", ("\n".join(words) + "\n").encode())
    page = write_page(out / "index.html", report.TITLE, report.introduction(c), parts, findings, words)
    click.echo("\n".join(running.first_sentences(parts, findings)))
    click.echo(f"\nWritten to {page.parent}: {page.name} (open it in a browser), summary.txt, figures/, data/")


if __name__ == "__main__":
    main()
