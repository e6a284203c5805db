"""Rehearsals: the estimate follows from measured times, and the real run does not notice them."""

import json
from types import SimpleNamespace

import pytest

from eg3d_rlhf.evaluation.summary import CHANGE
from eg3d_rlhf.experiments import mode
from eg3d_rlhf.experiments.rehearsal_report import temporary_folder, time_lines
from eg3d_rlhf.experiments.run import Run
from tests.rejections import raising, rejected
from tests.tiny_runs import build_loop, build_networks, run, train_flags, whole_run, write_dataset
from tests.tuning.flow import tiny_trainings
from training import networks, rehearsal
from training.loop import TrainingLoop


@pytest.fixture
def clock(monkeypatch):
    """A clock for measured times that moves only when a test moves it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def estimates(measured: rehearsal.Rehearsal) -> dict[str, tuple[float, float]]:
    """(seconds per step, planned steps) by the name of the work."""
    return {cost.name: (cost.seconds_per_step, cost.planned) for cost in measured.costs()}


def test_estimate_is_the_mean_measured_time_times_the_planned_steps(clock):
    with rehearsal.rehearsing() as measured:
        clock.now += 7  # opening of files
        for seconds in (2.0, 4.0):
            with rehearsal.timed(rehearsal.TRAINING, "updates", planned=100):
                clock.now += seconds
        with rehearsal.timed(rehearsal.CHECKPOINTS, "checkpoints", planned=5):
            clock.now += 10
        clock.now += 1
    assert measured.seconds_by_part() == {
        "start": 8.0,
        "training": 300.0,
        "checkpoints": 50.0,
        "summary": 0.0,
    }
    assert "0.0994 h" in "\n".join(time_lines(measured))  # 358 s


def test_first_items_stand_for_all_items_of_a_loop(clock):
    with rehearsal.rehearsing() as measured, rehearsal.timed(rehearsal.SUMMARY, "heads"):
        for _ in rehearsal.first(range(64), 2):
            clock.now += 3
    assert measured.seconds_by_part()["summary"] == 64 * 3
    assert rehearsal.first(range(64), 2) == range(64)  # in a real run


def test_blocks_inside_a_block_are_counted_once(clock):
    with rehearsal.rehearsing() as measured:
        with rehearsal.timed(rehearsal.TRAINING, "evaluations", planned=10):
            clock.now += 2
            with rehearsal.timed(rehearsal.TRAINING, "baseline"):
                clock.now += 5
    work = estimates(measured)
    assert (work["evaluations"], work["baseline"]) == ((2.0, 10), (5.0, 1))
    assert measured.seconds_by_part()["start"] == 0


def test_sections_add_up_and_multiply(clock):
    with rehearsal.rehearsing() as measured:
        for seconds in (1.0, 3.0):  # two trainings, each of which four seeds repeat on two processes
            with rehearsal.section(times=4 / 2), rehearsal.timed(rehearsal.TRAINING, "updates", planned=50):
                clock.now += seconds
    assert estimates(measured)["updates"] == (2.0, 200)


def test_work_without_planned_steps_is_done_as_often_as_in_the_rehearsal(clock):
    with rehearsal.rehearsing() as measured, rehearsal.section(times=3):
        for seconds in (1.0, 5.0):
            with rehearsal.timed(rehearsal.SUMMARY, "evaluation"):
                clock.now += seconds
    assert measured.seconds_by_part()["summary"] == 18.0


def test_a_real_run_measures_nothing(clock):
    with rehearsal.section(times=3), rehearsal.timed(rehearsal.TRAINING, "updates", planned=50):
        clock.now += 1
    assert rehearsal.current() is None and not rehearsal.active()


def test_gan_loop_does_one_tick_and_plans_the_whole_run(tmp_path, clock, monkeypatch):
    """Seconds of a phase and of a checkpoint are fixed here; all other work takes no time."""
    run_phase = TrainingLoop._run_phase
    save_checkpoint = TrainingLoop.save_checkpoint
    seconds_of_phase = {"Gmain": 2.0, "Greg": 3.0, "Dmain": 1.0, "Dreg": 5.0}

    def slow_phase(self, phase):
        run_phase(self, phase)
        clock.now += seconds_of_phase[phase.name]

    def slow_checkpoint(self):
        clock.now += 11.0
        return save_checkpoint(self)

    monkeypatch.setattr(TrainingLoop, "_run_phase", slow_phase)
    monkeypatch.setattr(TrainingLoop, "save_checkpoint", slow_checkpoint)
    data = write_dataset(tmp_path / "data.zip")
    # 1,000 images in batches of 4 are 250 iterations; a tick has 4 of them, so there are 63 ticks
    loop = build_loop(data, tmp_path / "run", loop={"kimg": 1.0, "checkpoint_ticks": 3})
    with rehearsal.rehearsing() as measured:
        loop.run()
    assert loop.cur_nimg == 16
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    work = estimates(measured)
    intervals = {phase.name: phase.interval for phase in loop.phases}
    for name, seconds in seconds_of_phase.items():
        assert work[f"phase {name}"] == (seconds, -(-250 // intervals[name]))
    assert work["checkpoints"] == (11.0, 21)
    assert work["snapshots"][1] == 2  # at the interval of 50 ticks, and at the end


def test_train_py_rehearses_and_the_real_run_is_bitwise_unchanged(tmp_path):
    data = write_dataset(tmp_path / "data.zip")
    init = tmp_path / "init.safetensors"
    networks.save(init, build_networks())
    flags = ("--kimg=0.016", "--tick=0.008")
    straight = whole_run(data, init, tmp_path / "straight", *flags)
    outdir = tmp_path / "runs" / "deep"
    result = run(*train_flags(data, init, outdir, *flags, "--rehearse"))
    assert result.exit_code == 0, result.output
    assert "tick 1 " in result.output and "tick 2 " not in result.output
    assert not (tmp_path / "runs").exists()
    real = whole_run(data, init, outdir, *flags)
    assert real.name == straight.name  # the rehearsal has taken no number
    for name in ("stats.jsonl", "checkpoint-000000016.safetensors", "network-snapshot-000000.safetensors"):
        assert (real / name).read_bytes() == (straight / name).read_bytes(), name
    assert "rehearsal" not in json.loads((real / "training_options.json").read_text())


def test_rehearsal_of_a_training_of_a_flow_stage(tmp_path):
    config = tiny_trainings.tiny_config(**tiny_trainings.EVERYTHING)
    before = tiny_trainings.with_everything(tmp_path / "before")
    with rehearsal.rehearsing() as measured:
        rehearsed = tiny_trainings.with_everything(tmp_path / "rehearsed")
    after = tiny_trainings.with_everything(tmp_path / "after")
    assert after.stats == before.stats
    for name in tiny_trainings.FINISHED:
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name
    assert rehearsed.stats[-1]["step"] == config.log_every
    planned = {name: steps for name, (_, steps) in estimates(measured).items()}
    assert planned["updates"] == config.steps
    assert planned["evaluations"] == 1 + -(-config.steps // config.held_out_every)
    assert planned["checkpoints"] == (config.steps - 1) // config.checkpoint_every
    assert planned["baseline"] == 1


def test_rehearsal_flag_is_rejected_where_it_has_no_meaning(tmp_path):
    rejected(run("--rehearse", f"--resume={tmp_path}"), "--rehearse", "--resume")
    rejected(run("--reward=sigma", "--rounds=2", "--rehearse", f"--outdir={tmp_path}"), "--rounds")
    rejected(
        run("--mode=circular-dpo", "--ablate=a,d", "--rehearse", f"--outdir={tmp_path}"),
        "--rehearse",
        "--ablate",
    )
    assert not list(tmp_path.iterdir())


def test_folder_that_a_killed_rehearsal_left_is_not_resumed(tmp_path):
    with rehearsal.rehearsing():
        Run(tmp_path, {"lr": 1}).begin()
    with raising("--resume", str(tmp_path)):
        Run(tmp_path, {"lr": 1}).resume()


@pytest.mark.parametrize("outdir_exists", [True, False])
def test_folder_is_deleted_after_an_error_and_the_outdir_stays(tmp_path, outdir_exists):
    outdir = tmp_path / "runs"
    if outdir_exists:
        outdir.mkdir()
    with pytest.raises(RuntimeError), temporary_folder(outdir) as folder:
        (folder / "run").mkdir()
        assert folder.parent == outdir
        raise RuntimeError
    assert outdir.exists() == outdir_exists
    assert not outdir_exists or not list(outdir.iterdir())


def test_rehearsal_stops_with_130_and_no_resume_hint(capsys):
    with pytest.raises(SystemExit) as stopped, mode.running("cpu", 30, None):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert "--resume" not in capsys.readouterr().err


@pytest.mark.long
def test_summary_of_the_bundled_generator_is_rehearsed_on_its_first_latents(tmp_path, monkeypatch):
    """All parts of the summary are measured, and nothing is stored for later runs."""
    measured_runs = []
    monkeypatch.setattr(
        "eg3d_rlhf.experiments.rehearsal_report.time_lines",
        lambda measured: measured_runs.append(measured) or [],
    )
    stored = []
    monkeypatch.setattr("eg3d_rlhf.experiments.store.Store.make", lambda *arguments: stored.append(arguments))
    result = run(
        *("--reward=sigma", "--lambda-r=10", "--kimg=0.02", "--tick=0.004", "--device=cpu", "--rehearse"),
        f"--outdir={tmp_path}",
    )
    assert result.exit_code == 0, result.output
    (measured,) = measured_runs
    names = {cost.name for cost in measured.costs() if cost.part == "summary"}
    assert {"rewards", "heads", "images", "views", CHANGE, "turntable"} <= names
    assert measured.seconds_by_part()["summary"] > 0
    assert not stored and not list(tmp_path.iterdir())
