"""Running rows: what is recorded, what is an error, what is skipped after an interruption."""

import json
import time
import types

import pytest
import torch

from benchmarks import report
from benchmarks.rows import Case, DisagreementError, Outcome, Row
from benchmarks.session import Options, Session, run_row, select
from tests.benchmarks import fake
from torch_utils.ops import implementations

REQUIRED = {
    "name", "size", "device", "reference_s", "fast_s", "ratio", "max_abs_error", "extra_memory_mb", "reference_extra_memory_mb",
    "gradient_error", "repeats", "target", "met", "ratio_low", "ratio_high", "fast_min_s", "fast_max_s", "reference_min_s",
    "reference_max_s",
}


@pytest.fixture
def options(tmp_path):
    return lambda **kwargs: Options(**{"out": tmp_path / "results", "meter": None, "repeats": 3, **kwargs})


def saved(options: Options) -> dict:
    return json.loads((options.out / f"{options.stem}.json").read_text())


def test_a_faster_path_gets_its_ratio_and_all_fields(options):
    sizes = {"fast": 3_000_000, "reference": 90_000_000}
    settings = options(meter=lambda row, device, path, tiny: sizes[path])
    Session([fake.row(fast=0.01, slow=0.05)], settings).run()
    result = saved(settings)
    assert {"machine", "threads", "versions", "rows", "compiled_ops"} <= result.keys()
    (record,) = result["rows"]
    assert REQUIRED <= record.keys()
    assert record["repeats"] == 3 and (record["extra_memory_mb"], record["reference_extra_memory_mb"]) == (3, 90)
    assert record["fast_s"] >= 0.01 and record["reference_s"] >= 0.05
    assert record["ratio"] == pytest.approx(record["reference_s"] / record["fast_s"])
    assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"] and record["ratio_interval"] == "range"
    assert record["fast_min_s"] <= record["fast_s"] <= record["fast_max_s"] and len(record["fast_all_s"]) == 3
    assert record["met"] is True and record["target"] == {"at_least": 1.5, "aim": 3}
    assert record["max_abs_error"] == 0 and record["gradient_error"] == 0


def test_a_slower_path_misses_its_target(options):
    record = run_row(fake.row(fast=0.01, slow=0.005), options())
    assert record["ratio"] < 1 and record["met"] is False


def test_memory_over_its_limit_misses_the_target():
    target = fake.Target(at_least=2, aim=4, memory_mb_below=200)
    assert [target.met(3, m) for m in (100, 300, None)] == [True, False, None] and target.met(1, 100) is False


def test_the_table_names_machine_threads_and_versions_but_no_host_or_path(options, repo):
    settings = options()
    Session([fake.row()], settings).run()
    table = (settings.out / "latest.md").read_text()
    assert f"torch {torch.__version__}" in table and f"{torch.get_num_threads()} threads" in table and "| sleep | full | cpu |" in table
    import platform

    text = table + (settings.out / "latest.json").read_text()
    assert str(repo) not in text and str(settings.out) not in text
    assert platform.node() not in text.replace(report.machine("cpu")["processor"], "") or len(platform.node()) < 4


@pytest.mark.parametrize(
    ("errors", "word"), [({"error": 1e-3}, "outputs"), ({"gradient_error": 1e-2}, "gradients"), ({"error": float("nan")}, "outputs")]
)
def test_paths_that_disagree_are_an_error(options, errors, word):
    with pytest.raises(DisagreementError, match=word):
        run_row(fake.row(**errors), options())


def test_disagreement_is_reported_and_the_other_rows_go_on(options):
    settings = options()
    session = Session([fake.row("wrong", error=1.0), fake.row("right")], settings)
    session.run()
    assert [r["name"] for r in saved(settings)["rows"]] == ["right"]
    assert len(session.failures) == 1 and session.failures[0].startswith("wrong (full, cpu): the paths disagree")


def test_small_errors_are_recorded(options):
    record = run_row(fake.row(error=4e-6, gradient_error=5e-5), options())
    assert record["max_abs_error"] == pytest.approx(4e-6, rel=0.1) and record["gradient_error"] == pytest.approx(5e-5, rel=0.1)


def test_resume_skips_finished_rows_and_keeps_them(options):
    calls = []
    first, second = fake.row("first", calls=calls), fake.row("second", calls=calls)
    settings = options(resume=True)
    Session([first], settings).run()
    before = saved(settings)["rows"][0]
    Session([first, second], settings).run()
    assert calls == ["first", "second"]
    rows = saved(settings)["rows"]
    assert [r["name"] for r in rows] == ["first", "second"] and rows[0] == before


def test_without_resume_everything_runs_again(options):
    calls = []
    one = fake.row(calls=calls)
    Session([one], options()).run()
    Session([one], options()).run()
    assert len(calls) == 2


@pytest.mark.parametrize(("name", "value"), [("versions", {"torch": "1.0"}), ("sources", "0" * 12)])
def test_resume_refuses_results_of_other_versions_and_code(options, name, value):
    settings = options(resume=True)
    Session([fake.row()], settings).run()
    report.write(settings.out, settings.stem, saved(settings) | {name: value})
    with pytest.raises(ValueError, match=f"--resume: expected .* with {name}"):
        Session([fake.row()], settings).run()


def test_rows_are_saved_one_by_one(options):
    settings = options()

    def broken(device, tiny):
        assert [r["name"] for r in saved(settings)["rows"]] == ["first"]
        raise RuntimeError("out of memory")

    rows = [fake.row("first"), Row(name="second", size="full", make=broken, seconds=1)]
    with pytest.raises(RuntimeError, match="out of memory"):
        Session(rows, settings).run()
    assert [r["name"] for r in saved(settings)["rows"]] == ["first"]


def test_the_budget_sets_the_rounds(options):
    count = run_row(fake.row(fast=0.01, slow=0.03), options(repeats=None, budget=0.2))["repeats"]
    assert 2 <= count <= 5
    assert run_row(fake.row(fast=0.01, slow=0.03), options(repeats=None, budget=0.0))["repeats"] == 2


def test_the_reference_is_the_ref_implementation_and_both_paths_draw_the_same(options):
    seen = {}

    def run() -> Outcome:
        seen.setdefault(implementations.current(), []).append(torch.rand(1).item())
        return Outcome({"y": torch.zeros(1)})

    run_row(Row(name="x", size="full", make=lambda device, tiny: Case(fast=run), seconds=0.01), options())
    assert seen.keys() == {"auto", "ref"} and seen["auto"][-3:] == seen["ref"][-3:]


def test_every_call_starts_from_the_prepared_state_outside_the_clock(options):
    state = types.SimpleNamespace(value=None)

    def prepare() -> None:
        time.sleep(0.05)
        state.value = 0

    def run() -> Outcome:
        state.value += 1
        return Outcome({"value": torch.tensor(state.value)})

    case = Case(fast=run, prepare=prepare)
    record = run_row(Row(name="x", size="full", make=lambda device, tiny: case, seconds=0.01), options())
    assert record["fast_max_s"] < 0.05 and record["max_abs_error"] == 0


def test_further_columns_are_timed_and_their_failures_named(options):
    def fails() -> Outcome:
        raise RuntimeError("no compiler\nat all")

    base = fake.case(0.001, 0.002)
    wrong = fake.case(0.001, 0.002, error=1.0).fast
    others = {"torch": base.reference, "compiled_torch": fails, "compiled_reference": wrong}
    case = Case(fast=base.fast, reference=base.reference, others=others)
    one = Row(name="x", size="full", make=lambda device, tiny: case, seconds=0.01)
    assert "others" not in run_row(one, options())
    record = run_row(one, options(torch_compile=True))
    assert record["others"]["torch"] >= 0.002 and record["others"]["compiled_torch"] == "RuntimeError: no compiler"
    assert record["others"]["compiled_reference"].startswith("disagrees: expected outputs within")
    assert record["others_processor"].keys() == {"torch"}


def test_rows_are_chosen_by_part_pattern_and_size():
    rows = [fake.row("slab forward"), fake.row("G forward"), fake.row("slab forward", size="bundled")]
    assert [r.name for r in select(rows, ["slab"], "both")] == ["slab forward"] * 2
    assert [r.name for r in select(rows, ["g for*"], "full")] == ["G forward"]
    assert len(select(rows, [], "full")) == 2
    assert [r.name for r in select([fake.row("slab"), *rows], ["slab"], "both")] == ["slab"]
    with pytest.raises(ValueError, match="fits none of size bundled"):
        select(rows, ["G forward"], "bundled")
