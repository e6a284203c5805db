"""Figures over training seeds: their means and spread, what is left out, and the tool that repeats only what
is missing.
"""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.statistics import paired_summary
from eg3d_rlhf.evaluation import trainings
from eg3d_rlhf.evaluation.over_seeds import gather, table
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import summarise_over_seeds
from eg3d_rlhf.modes.report_studies import seeds


def record(gap: float, shift: float) -> dict:
    """A run's summary, of the parts that matter here."""
    paired = paired_summary([0.0, 0.0, 0.1, 0.2], [shift, shift, 0.1 + shift, 0.2 + shift])._asdict()
    row = {
        "name": "depth",
        "before": 0.1,
        "after": 0.1 + shift,
        "higher_is_better": False,
        "paired": paired,
        "outcome": "better" if shift < 0 else "worse",
    }
    return {
        "tuned_delta_mean": 7.0,
        "error_reduction": gap,
        "error_reduction_ci95": [gap - 0.1, gap + 0.1],
        "geometry": [row],
        "seconds": 100.0,
        "over_optimisation": [],
    }


def test_means_spread_and_intervals():
    metrics = gather({"0": record(0.5, -0.1), "1": record(0.6, -0.2), "2": record(0.7, 0.3)})
    gap = metrics["error_reduction"]
    (depth,) = metrics["geometry"]
    assert metrics["seeds"] == [0, 1, 2] and gap["by_seed"] == {"0": 0.5, "1": 0.6, "2": 0.7}
    assert (gap["mean"], gap["std"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert gap["ci95_over_seeds"] == pytest.approx(
        [0.6 - 4.302653 * 0.1 / 3**0.5, 0.6 + 4.302653 * 0.1 / 3**0.5]
    )
    assert gap["ci95_by_seed"]["1"] == pytest.approx([0.5, 0.7])
    assert depth["outcomes"] == {"0": "better", "1": "better", "2": "worse"} and depth["change"][
        "mean"
    ] == pytest.approx(0)
    (share,) = (row for row in table(metrics) if "%" in row[1])
    assert share[1:] == ["50.0%", "60.0%", "70.0%", "60.0% ± 10.0%"]
    (change,) = (row for row in table(metrics) if row[0].startswith("depth"))
    assert change[3] == "+0.3 worse"


def test_what_one_summary_lacks_is_left_out():
    metrics = gather(
        {"0": record(0.5, -0.1), "1": {**record(0.6, -0.2), "error_reduction": None, "geometry": []}}
    )
    assert "error_reduction" not in metrics and metrics["geometry"] == [] and "tuned_delta_mean" in metrics
    assert summarise_over_seeds({"0": 2.0})["ci95_over_seeds"] is None


@pytest.fixture
def training(monkeypatch):
    """Stands in for the runs of train.py: notes which are asked for, and writes finished ones."""
    asked = []

    def make(chains, **_):
        ((part,),) = chains
        asked.append(part)
        run = part.folder / f"{len(asked):05d}-x"
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps(record(0.1 * len(asked), -0.1)))
        Store.finish(part.folder, part.inputs(), [run / "summary.json"], {"seconds": 1.0})

    monkeypatch.setattr(trainings, "make", make)
    return asked


def run(out, *flags):
    return CliRunner().invoke(seeds, ["--seeds=0,5", f"--outdir={out}", *flags])


def test_finished_runs_are_not_repeated(training, tmp_path):
    out = tmp_path / "seeds"
    first = run(out)
    assert first.exit_code == 0, first.output
    assert [part.flags[-1] for part in training] == ["--seed=0", "--seed=5"] and "20.0%" in first.stdout
    assert json.loads((out / "summary.json").read_text())["error_reduction"]["by_seed"] == {
        "0": 0.1,
        "5": 0.2,
    }
    assert json.loads(run(out, "-n").stdout) == {"0": "finished", "5": "finished"}
    assert run(out).exit_code == 0 and len(training) == 2
    assert run(out, "--", "--kimg=0.5").exit_code == 0 and len(training) == 4  # other settings are other runs
    (training[1].run / "summary.json").unlink()
    assert (
        json.loads(run(out, "-n").stdout)["5"][0] == "train.py"
        and json.loads(run(out, "-n").stdout)["0"] == "finished"
    )
