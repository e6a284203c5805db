"""The whole report: its command, its page, what it says first; resumed, selected, rejected; its strips of
shapes.
"""

import html
import json
import re

import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.evaluation import comparison_page
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments import pages
from eg3d_rlhf.experiments.pages import Facts, Finding
from eg3d_rlhf.modes import reports
from tests.evaluation import comparisons
from tests.rejections import check_message
from tests.tools.examples import run_example


@pytest.fixture()
def flags(tiny_networks, tiny_reward, tiny_pair, tiny_data, tmp_path):
    tuned, control = tiny_pair
    return [
        f"--before={tiny_networks}",
        f"--after={tuned}",
        f"--control={control}",
        f"--reward-ckpt={tiny_reward}",
        f"--set=data={tiny_data}",
        "--n=16",
        "--set=images=20",
        "--set=batch=8",
        "--device=cpu",
        f"--outdir={tmp_path / 'out'}",
        "--only=reward-psi,rank-consistency",
    ]


def run(flags, *more):
    return CliRunner().invoke(reports.evaluate, [*flags, *more])


def test_page_summary_and_table(flags, tmp_path):
    done = run(flags)
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    page = (out / "index.html").read_text()
    words = (out / "summary.txt").read_text()
    assert 'id="reward-psi"' in page and 'id="rank-consistency"' in page and 'id="diversity"' not in page
    # what the figures allow and what they do not stands first on the page, too
    lines = [line for line in words.splitlines() if line]
    assert len(lines) > 2 and all(html.escape(line, quote=False) in page for line in lines[:3])
    assert "index.html" in done.output
    assert {"reward-psi.json", "reward-psi.csv"} <= {path.name for path in (out / "data").iterdir()}


def test_a_second_call_computes_nothing(flags, monkeypatch):
    assert run(flags, "--only=reward-psi").exit_code == 0
    monkeypatch.setattr(Comparison, "scores", lambda *a, **k: pytest.fail("computed again"))
    assert run(flags, "--only=reward-psi").exit_code == 0


def test_dry_run_prints_what_would_be_done(flags, tmp_path):
    done = run(flags, "--dry-run")
    values = json.loads(done.output)
    assert done.exit_code == 0 and values["parts"] == ["reward-psi", "rank-consistency"] and values["n"] == 16
    assert (
        len({values[role]["hash"] for role in ("before", "after", "control")}) == 3
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (("--only=reward-shift,nothing",), ("--only", "reward-shift", "nothing")),
        (("--only=,",), ("--only", "reward-shift")),
        (("--set=data=none.zip", "--only=image-distances"), ("none.zip",)),
        (("--set=lpips=none.pt",), ("--set lpips=", "none.pt")),
        (("--run=none",), ("--run", "none")),
        (("--heldout-reward=none.safetensors",), ("--heldout-reward", "none.safetensors")),
    ],
)
def test_mistakes_are_one_line(flags, more, names):
    done = run(flags, *more)
    *progress, line = done.stderr.splitlines()
    assert done.exit_code == 2 and line.startswith("Error: ") and len(progress) <= 1, done.stderr
    check_message(line, names)


def finding(data):
    return Finding(facts=Facts(n=1), data=data)


def shift(after, control):
    return finding(
        {
            "paired": {
                "after": {"mean": after, "mean_lo": after - 0.1, "mean_hi": after + 0.1},
                "control": {"mean": control},
            }
        }
    )


def test_what_a_shift_allows(tiny_comparison):
    alone, beside, none = (
        comparison_page.list_conclusions(tiny_comparison, {"reward-shift": shift(*means)})[0]
        for means in ((5.0, 0.1), (5.0, 2.0), (0.05, 0.0))
    )
    assert "5.00" in alone and "5.00" in beside
    # the cause is named where the control stood still
    assert "control" in alone and "control" not in beside
    assert not re.search(r"\d", none)
    assert {line.partition(":")[0] for line in (alone, beside, none)} == {alone.partition(":")[0]}
    assert none not in comparison_page.list_conclusions(tiny_comparison, {"reward-shift": shift(5.0, 0.1)})


@pytest.mark.parametrize("ratio", [1.004, 0.9996, 1.3])
def test_a_statement_about_diversity_shows_that_its_ratio_is_not_one(tiny_comparison, ratio):
    row = {"of": "Shapes", "role": "after", "ratio": ratio}
    row |= {"ratio_lo": ratio - abs(ratio - 1) / 2, "ratio_hi": ratio + abs(ratio - 1) / 2}
    sentences = comparison_page.list_conclusions(tiny_comparison, {"diversity": finding({"rows": [row]})})
    (sentence,) = (sentence for sentence in sentences if "Shapes" in sentence)
    printed = [float(number) for number in re.findall(r"\d+\.\d+", sentence)]
    assert printed == pytest.approx([ratio, row["ratio_lo"], row["ratio_hi"]], rel=0.01)
    # every number is on the same side of 1 as the statement
    assert all(number > 1 for number in printed) if ratio > 1 else all(number < 1 for number in printed)


def test_a_small_rise_of_the_reward_is_not_printed_as_zero(tiny_comparison):
    change = {"mean": 0.003, "mean_lo": 0.001, "mean_hi": 0.005}
    sentence = comparison_page.list_conclusions(
        tiny_comparison, {"reward-shift": finding({"paired": {"after": change}})}
    )[0]
    assert [float(number) for number in re.findall(r"\d+\.\d+", sentence)] == [0.003, 0.001, 0.005]


def test_what_is_not_allowed(tiny_comparison, unchanged, monkeypatch):
    lines = comparison_page.list_conclusions(unchanged, {"identity-drift": finding({"absent": "no network"})})
    for word in ("control", "over-optimisation", "identity-drift"):
        assert sum(word in line for line in lines) == 1, word
    with_control = comparison_page.list_conclusions(tiny_comparison, {})
    assert not any("control" in line or "identity-drift" in line for line in with_control)
    monkeypatch.setattr(Comparison, "synthetic", True)
    assert len(comparison_page.list_conclusions(tiny_comparison, {})) == len(with_control) + 1


def test_a_control_that_differs_is_reported(tiny_comparison, tmp_path):
    other = comparisons.write_run(tmp_path / "other", {64: 0.1}, 0.0, batch=99)
    lines = comparison_page.list_conclusions(
        Comparison(**{**vars(tiny_comparison), "control_run": other}), {}
    )
    assert any(re.search(r"\bbatch 99\b.* 4\b", line) for line in lines)


@pytest.mark.long
def test_the_example_with_nothing_but_a_run(tmp_path):
    """All defaults: the newest run in runs/ that began from the bundled generator."""
    run = comparisons.write_run(
        tmp_path / "runs/00000-tuned", {}, 10.0, hashes={"init": file_hash(bundled.GENERATOR)}
    )
    (run / "network-snapshot-000000.safetensors").write_bytes(bundled.GENERATOR.read_bytes())
    assert "over-optimisation" in run_example(reports.evaluate, tmp_path)
    assert (tmp_path / "runs/reports/evaluate/index.html").is_file()


@pytest.fixture()
def small(monkeypatch):
    monkeypatch.setattr(comparison_page, "RESOLUTION", 12)
    monkeypatch.setattr(comparison_page, "PIXELS", 16)


def sizes(finding, folder):
    return {name: PIL.Image.open(folder / name).size for name in finding.images.values()}


def test_highest_and_lowest_are_the_rewards(tiny_comparison, small, tmp_path):
    c = tiny_comparison
    finding = comparison_page.reward_strips(c, tmp_path)
    k = finding.data["k"]
    assert k == min(comparison_page.K, c.n // 2)
    for role in ("before", "after"):
        scores = dict(zip(c.seeds(), c.scores(c.generators()[role], c.seeds()).tolist(), strict=True))
        order = sorted(scores, key=scores.get, reverse=True)
        picked = {
            w: [row["seed"] for row in finding.rows if (row["role"], row["which"]) == (role, w)]
            for w in ("highest", "lowest")
        }
        assert picked == {"highest": order[:k], "lowest": order[::-1][:k]}
    assert set(sizes(finding, tmp_path).values()) == {(16 * k, 32)}


def test_orbit_stops_and_is_hidden_where_motion_is_unwelcome(tiny_comparison, small, monkeypatch, tmp_path):
    def turning(c, generator, seeds, yaws):  # a picture that differs in every frame
        return torch.linspace(0, 1, len(yaws)).reshape(1, -1, 1, 1, 1).expand(1, len(yaws), 1, 16, 16)

    monkeypatch.setattr(comparison_page, "shapes", turning)
    job = next(j for j in comparison_page.strip_jobs(tiny_comparison) if j.key == "orbit")
    findings = pages.run([job], tmp_path, quiet=True)
    moving = PIL.Image.open(tmp_path / "data" / "orbit.apng")
    assert (moving.format, moving.size, moving.info["loop"]) == (
        "PNG",
        (32, 16),
        comparison_page.SWINGS,
    ) and moving.is_animated
    assert comparison_page.ORBIT_FRAMES * comparison_page.FRAME_MS * comparison_page.SWINGS <= 5000
    text = pages.write_page(tmp_path / "index.html", "t", "i", [job], findings).read_text()
    assert text.count('<figure class="moving">') == 1 and text.count("<img ") == 2
    assert "@media (prefers-reduced-motion: reduce), print { .moving { display: none; } }" in text
