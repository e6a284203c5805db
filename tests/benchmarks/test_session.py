"""Running rows: what is recorded, what is an error."""

import json
import platform
import time
import types

import pytest
import torch

from benchmarks import benchmark_report as report
from benchmarks import session
from benchmarks.rows import Case, DisagreementError, Outcome, Row
from benchmarks.session import Options, run, run_row, select
from tests.benchmarks import fake
from tests.rejections import raising
from torch_utils.ops import implementations

REQUIRED = {
    "name",
    "size",
    "device",
    "reference_s",
    "fast_s",
    "ratio",
    "max_abs_error",
    "extra_memory_mb",
    "reference_extra_memory_mb",
    "gradient_error",
    "repeats",
    "target",
    "met",
    "ratio_low",
    "ratio_high",
    "fast_min_s",
    "fast_max_s",
    "reference_min_s",
    "reference_max_s",
}


@pytest.fixture
def options(tmp_path):
    return lambda **kwargs: Options(**{"out": tmp_path / "results", "meter": None, "repeats": 3, **kwargs})


def saved(options: Options) -> dict:
    return json.loads((options.out / f"{options.stem}.json").read_text())


def row_of(case: Case) -> Row:
    return Row(name="x", size="full", make=lambda device, tiny: case, seconds=0.01)


def test_a_faster_path_gets_its_ratio_and_all_fields(options, repo):
    sizes = {"fast": 3_000_000, "reference": 90_000_000}
    settings = options(meter=lambda row, device, path, tiny: sizes[path])
    run([fake.row(fast=0.01, slow=0.05)], settings)
    result = saved(settings)
    assert {"machine", "threads", "versions", "rows", "compiled_ops"} <= result.keys()
    (record,) = result["rows"]
    assert REQUIRED <= record.keys()
    assert record["repeats"] == 3 and (record["extra_memory_mb"], record["reference_extra_memory_mb"]) == (
        3,
        90,
    )
    assert record["fast_s"] >= 0.01 and record["reference_s"] >= 0.05
    assert record["ratio"] == pytest.approx(record["reference_s"] / record["fast_s"])
    assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
    assert record["fast_min_s"] <= record["fast_s"] <= record["fast_max_s"] and len(record["fast_all_s"]) == 3
    assert record["met"] is True and record["target"] == {"at_least": 1.5, "aim": 3}
    assert record["max_abs_error"] == 0 and record["gradient_error"] == 0
    table = (settings.out / "latest.md").read_text()
    assert (
        f"torch {torch.__version__}" in table
        and f"{torch.get_num_threads()} threads" in table
        and "| sleep | full | cpu |" in table
    )
    text = table + (settings.out / "latest.json").read_text()  # names no host and no path
    assert str(repo) not in text and str(settings.out) not in text
    assert (
        platform.node() not in text.replace(report.describe_machine("cpu")["processor"], "")
        or len(platform.node()) < 4
    )


def test_a_target_is_missed_by_speed_or_memory(options):
    record = run_row(fake.row(fast=0.01, slow=0.005), options())
    assert record["ratio"] < 1 and record["met"] is False
    target = fake.Target(at_least=2, aim=4, memory_mb_below=200)
    assert [target.met(3, m) for m in (100, 300, None)] == [True, False, None] and target.met(1, 100) is False


@pytest.mark.parametrize(
    ("errors", "word"),
    [
        ({"error": 1e-3}, "outputs"),
        ({"gradient_error": 1e-2}, "gradients"),
        ({"error": float("nan")}, "outputs"),
    ],
)
def test_paths_that_disagree_are_an_error(options, errors, word):
    with pytest.raises(DisagreementError, match=word):
        run_row(fake.row(**errors), options())


def test_rows_are_saved_one_by_one(options):
    settings = options()

    def broken(device, tiny):
        assert [r["name"] for r in saved(settings)["rows"]] == ["first"]
        raise MemoryError

    with pytest.raises(MemoryError):
        run([fake.row("first"), Row(name="second", size="full", make=broken, seconds=1)], settings)
    assert [r["name"] for r in saved(settings)["rows"]] == ["first"]


def test_the_budget_sets_the_rounds(options, monkeypatch):
    assert [session.round_count_within_budget(s) for s in (1e-9, 1, 5, 100)] == [11, 11, 3, 2]
    monkeypatch.setattr(session, "BUDGET", 0.0)
    assert run_row(fake.row(fast=0.01, slow=0.03), options(repeats=None))["repeats"] == 2


def test_the_reference_is_the_ref_implementation_and_both_paths_draw_the_same(options):
    seen = {}

    def path() -> Outcome:
        seen.setdefault(implementations.current(), []).append(torch.rand(1).item())
        return Outcome({"y": torch.zeros(1)})

    run_row(row_of(Case(fast=path)), options())
    assert seen.keys() == {"auto", "ref"} and seen["auto"][-3:] == seen["ref"][-3:]


def test_every_call_starts_from_the_prepared_state_outside_the_clock(options):
    state = types.SimpleNamespace(value=None)

    def prepare() -> None:
        time.sleep(0.05)
        state.value = 0

    def path() -> Outcome:
        state.value += 1
        return Outcome({"value": torch.tensor(state.value)})

    record = run_row(row_of(Case(fast=path, prepare=prepare)), options())
    assert record["fast_max_s"] < 0.05 and record["max_abs_error"] == 0


def test_further_columns_are_timed_and_their_failures_named(options):
    def fails() -> Outcome:
        raise RuntimeError("compiler\nmissing")

    base = fake.case(0.001, 0.002)
    wrong = fake.case(0.001, 0.002, error=1.0).fast
    others = {"torch": base.reference, "compiled_torch": fails, "compiled_reference": wrong}
    row = row_of(Case(fast=base.fast, reference=base.reference, others=others))
    assert "others" not in run_row(row, options())
    record = run_row(row, options(torch_compile=True))
    assert record["others"]["torch"] >= 0.002
    failed, disagrees = (record["others"][name] for name in ("compiled_torch", "compiled_reference"))
    assert failed == "RuntimeError: compiler"  # the first line alone
    assert "outputs" in disagrees and "\n" not in disagrees
    assert record["others_processor"].keys() == {"torch"}


def test_rows_are_chosen_by_part_pattern_and_size():
    rows = [fake.row("slab: forward"), fake.row("G forward"), fake.row("slab: forward", size="bundled")]
    assert [r.name for r in select(rows, ["slab"], "both")] == ["slab: forward"] * 2
    assert [r.name for r in select(rows, ["g for*"], "full")] == ["G forward"]
    assert len(select(rows, [], "full")) == 2
    assert [r.name for r in select([fake.row("slab"), *rows], ["slab"], "both")] == ["slab"]
    with raising("--rows", "'G forward'", "bundled", "--list"):
        select(rows, ["G forward"], "bundled")
