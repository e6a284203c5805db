"""Wording that the findings share, and the part of a report that says why a figure is missing."""

from pathlib import Path

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.reports.jobs import Facts, Finding, Job

BOOTSTRAP = "95 % percentile bootstrap over latents, 10,000 resamples"
NO_CONTROL = (
    "No control is shown: no run was named with --control, and none was found that differs from the tuned run in lambda_r = 0 alone. Run "
    "train.py with the same flags, --seed among them, and --lambda-r=0."
)


def span(value: float, lo: float, hi: float, form: str = "+.3f") -> str:
    """'+1.234 [1.100, 1.301]'."""
    return f"{value:{form}} [{lo:{form}}, {hi:{form}}]"


def contains_zero(lo: float, hi: float) -> bool:
    """Whether an interval leaves the sign open."""
    return lo <= 0 <= hi


def absent_job(c: Comparison, key: str, title: str, why: str) -> Job:
    """A part without figures that says why, and how to get them."""

    def compute(folder: Path) -> Finding:
        del folder
        return Finding(facts=Facts(n=0, networks=c.networks()), data={"absent": why}, says=[why])

    return Job(key=key, title=title, compute=compute, inputs={"absent": why, **c.inputs()})
