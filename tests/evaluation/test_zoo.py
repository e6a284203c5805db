"""The table of all rewards: its lines, its commands, and what goes on after an interrupt."""

import json
import threading
import time

import pytest
from click.testing import CliRunner

from eg3d_rlhf.evaluation import zoo
from eg3d_rlhf.evaluation.zoo import ENTRIES, record, rows
from tools import zoo as tool


class Learnt:
    """What a reward states of itself."""

    def __init__(self, **provenance):
        self.provenance = provenance


TEST = {"accuracy": 0.8, "interval_95": [0.75, 0.84], "n": 300, "correct": 240}
TUNED = {
    "win_rate": 0.9, "win_rate_ci95": [0.85, 0.93], "win_rate_n": 200,
    "gap_closed": 0.5, "reward_delta_positive": 97, "reward_delta_n": 100,
}


def test_a_line_takes_the_noise_free_order_where_it_is_known():
    clean = {**TEST, "accuracy": 0.85}
    line = record(Learnt(test_accuracy=TEST, test_accuracy_clean=clean), [TUNED], {"reward": 10.0, "seed0": 5.0}, 600.0)
    assert (line["accuracy"], line["accuracy_labels"], line["against"]) == (0.85, 0.8, "noise-free order")
    assert (line["seconds"], line["judge_rate"], line["judge_range"]) == (15.0, 0.9, [0.85, 0.93])
    assert record(Learnt(test_accuracy=TEST), [TUNED], {}, 600.0)["against"] == "labels"


def test_several_training_seeds_show_their_spread():
    line = record(Learnt(test_accuracy=TEST), [TUNED, {**TUNED, "win_rate": 1.0, "gap_closed": 0.7}], {}, 600.0)
    assert line["judge_rate"] == pytest.approx(0.95) and line["judge_range"] == [0.9, 1.0]
    assert line["gap_closed"] == pytest.approx(0.6) and line["rewards_up"] == [97, 97]


def test_a_reward_without_accuracy_is_refused():
    with pytest.raises(ValueError, match="states its accuracy"):
        record(Learnt(), [TUNED], {}, 600.0)


def test_every_line_has_every_column():
    found = {name: record(Learnt(test_accuracy=TEST), [TUNED], {"reward": 1.0}, 600.0) for name in ENTRIES}
    lines = rows(found)
    assert [line["reward"] for line in lines] == list(ENTRIES)
    assert all(all(str(cell) for cell in line.values()) for line in lines)
    assert zoo.plot_rates({"rewards": found}).axes


def planned(*flags: str) -> dict:
    result = CliRunner().invoke(tool.main, ["-n", *flags])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands(tmp_path):
    plan = planned(f"--out={tmp_path}", "--seeds=0,4")
    assert list(plan) == list(ENTRIES)
    assert list(plan["sigma"]) == ["seed0", "seed4"]  # bundled: nothing to train
    assert list(plan["thumbs"]) == ["label", "reward", "seed0", "seed4"]
    assert "--pairs=0" in plan["thumbs"]["reward"]  # the bundled pairs teach it nothing
    for name, parts in plan.items():
        assert all(flag in parts["seed4"] for flag in (*ENTRIES[name].tune, "--seed=4", "--no-summary"))
    short = ENTRIES["depth"].short[0]
    assert short in plan["depth"]["reward"] and short not in planned("--full", "--only=depth")["depth"]["reward"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("only", ["gamma", "", "points,gamma"])
def test_unknown_rewards(only):
    result = CliRunner().invoke(tool.main, [f"--only={only}"])
    assert result.exit_code == 2 and "--only: expected some of sigma" in result.output


def test_a_part_is_finished_with_its_own_command_alone(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; room = b'x' * 30_000_000; print(sys.argv[1], os.environ['OMP_NUM_THREADS'])")
    command, folder = [str(script), "--flag"], tmp_path / "part"
    cost = tool.call(folder, command, threads=3)
    assert cost["seconds"] > 0 and cost["megabytes"] > 30 and (folder / "log.txt").read_text() == "--flag 3\n"
    assert tool.finished(folder, command) == json.loads((folder / tool.DONE).read_text()) == cost
    assert tool.finished(folder, [*command, "--n=3"]) is None
    with monkeypatch.context() as patched:
        patched.setattr(tool, "inputs", lambda command: {"generator.safetensors": "another"})
        assert tool.finished(folder, command) is None
    (folder / "stale").touch()
    tool.call(folder, [*command, "--n=3"], threads=3)
    assert not (folder / "stale").exists() and tool.finished(folder, command) is None
    (tmp_path / "reward").write_text("one")
    before = tool.inputs([f"--reward-ckpt={tmp_path / 'reward'}"])
    (tmp_path / "reward").write_text("trained anew")
    assert tool.inputs([f"--reward-ckpt={tmp_path / 'reward'}"]) != before != tool.inputs([])


def test_a_part_that_fails_is_named_and_not_finished(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(2)")
    with pytest.raises(ValueError, match=r"expected status 0, got 2. See .*log.txt"):
        tool.call(tmp_path, [str(script)], threads=1)
    assert tool.finished(tmp_path, [str(script)]) is None


def test_an_interrupted_training_goes_on(tmp_path):
    command = ["tools/train_reward.py", f"--out={tmp_path}"]
    assert tool.continued(tmp_path, command) == command
    (tmp_path / "state.pt").touch()
    assert tool.continued(tmp_path, command) == [*command, "--resume"]


def test_parts_come_in_order_and_fill_every_place(tmp_path, monkeypatch):
    plans = {name: planned("--seeds=0,4")[name] for name in ENTRIES}
    lock, now, most, began = threading.Lock(), set(), [], []

    def make(folder, command, threads):
        key = folder.parent.name, folder.name
        with lock:
            now.add(key)
            began.append(key)
            most.append(len(now))
        time.sleep(0.01)
        with lock:
            now.remove(key)
        return {"seconds": 1.0, "megabytes": 2.0, "command": command, "threads": threads}

    monkeypatch.setattr(tool, "make", make)
    made = tool.work(tmp_path, plans, jobs=2, threads=1)
    assert {name: list(costs) for name, costs in made.items()} == {name: list(parts) for name, parts in plans.items()}
    for name, parts in plans.items():
        assert [part for owner, part in began if owner == name] == list(parts)
    longest = max(ENTRIES, key=lambda name: ENTRIES[name].minutes)
    assert began[0] == (longest, "reward") and max(most) == 2
    monkeypatch.setattr(tool, "make", lambda *_: (_ for _ in ()).throw(ValueError("a part failed")))
    with pytest.raises(ValueError, match="a part failed"):
        tool.work(tmp_path, plans, jobs=2, threads=1)
