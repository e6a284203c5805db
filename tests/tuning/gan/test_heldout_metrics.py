"""Monitor of over-optimisation: changes since the untuned generator, and alarms that survive a resume."""

import json
import types

import numpy as np
import pytest
import torch

from eg3d_rlhf.generators import ws_of_seeds
from eg3d_rlhf.tuning.gan.heldout_metrics import Monitor
from tests import tiny_runs


@pytest.mark.parametrize(
    ("deltas", "fallen"),
    [
        ({"reward": (1.0, 0.1), "heldout": (-0.5, 0.1), "utility": (0.2, 0.1)}, ["heldout"]),
        ({"reward": (1.0, 0.1), "heldout": (-0.5, 0.1), "utility": (-0.3, 0.1)}, ["heldout", "utility"]),
        ({"reward": (1.0, 0.1), "heldout": (-0.19, 0.1)}, []),  # within two standard errors
        ({"reward": (1.0, 0.1), "heldout": (-0.21, 0.1)}, ["heldout"]),
        ({"reward": (-1.0, 0.1), "heldout": (-0.5, 0.1)}, []),  # the reward did not rise
        ({"reward": (0.0, 0.0), "heldout": (-0.5, 0.1)}, []),
        ({"reward": (1.0, 0.1), "heldout": (0.0, 0.0)}, []),
        ({"reward": (1.0, 0.1)}, []),
    ],
)
def test_alarms_name_what_fell_while_the_reward_rose(deltas, fallen, tmp_path):
    monitor = Monitor(
        {name: lambda G, seeds: np.zeros(4) for name in deltas},
        tiny_runs.build_networks().G_ema,
        seeds=range(4),
    )
    stats = {
        f"Monitored/{name}": {"num": 2, "mean": mean, "std": error} for name, (mean, error) in deltas.items()
    }
    (tmp_path / "stats.jsonl").write_text(json.dumps({"nimg": 120, **stats}))
    monitor.restore(tmp_path / "stats.jsonl")
    assert monitor.alarms == ([{"nimg": 120, "fallen": fallen}] if fallen else [])


def scripted_monitor(values: list[tuple[list[float], list[float]]]) -> Monitor:
    """Return a monitor whose two measures return the listed values, call after call.

    The first pair is the untuned generator's.
    """
    streams = [iter([np.array(pair[i]) for pair in values]) for i in (0, 1)]
    measures = {
        name: lambda G, seeds, s=s: next(s) for name, s in zip(("reward", "heldout"), streams, strict=True)
    }
    return Monitor(measures, tiny_runs.build_networks().G_ema, seeds=range(4))


def tick(monitor: Monitor, nimg: int) -> tuple[dict, dict]:
    nets = types.SimpleNamespace(G_ema=tiny_runs.build_networks().G_ema)
    loop = types.SimpleNamespace(trained_object=types.SimpleNamespace(nets=nets), cur_nimg=nimg)
    stats: dict = {"Loss/G/loss": {"num": 1, "mean": 0.0, "std": 0.0}}
    return monitor(loop, stats), stats


def test_deltas_alarms_and_resume(tmp_path):
    monitor = scripted_monitor(
        [
            ([0, 0, 0, 0], [1, 2, 3, 4]),
            ([1, 1, 2, 2], [1.1, 2.1, 2.9, 4.1]),
            ([3, 3, 3, 3], [0, 0.5, 2.5, 2.5]),
        ]
    )
    fields, first = tick(monitor, 120)
    assert first["Monitored/reward"] == {"num": 4, "mean": 1.5, "std": 0.5}
    assert fields == {"reward": "+1.500", "heldout": "+0.050"} and monitor.alarms == []
    fields, second = tick(monitor, 240)
    assert fields == {"reward": "+3.000", "heldout": "-1.125", "WARNING": "over-optimised(heldout)"}
    delta = np.array([-1, -1.5, -0.5, -1.5])
    assert second["Monitored/heldout"] == {
        "num": 4,
        "mean": pytest.approx(-1.125),
        "std": pytest.approx(delta.std()),
    }
    assert monitor.alarms == [{"nimg": 240, "fallen": ["heldout"]}]

    lines = [{"tick": i, "nimg": n, **s} for i, (n, s) in enumerate([(120, first), (240, second)])]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resumed = scripted_monitor([([0, 0, 0, 0], [1, 2, 3, 4])])
    resumed.restore(tmp_path / "stats.jsonl")
    assert resumed.alarms == monitor.alarms
    resumed.restore(tmp_path / "none.jsonl")
    assert resumed.alarms == []


def test_the_measures_see_the_same_latents_every_time():
    seen = []

    def measure(G, seeds):
        seen.append(ws_of_seeds(G, seeds))
        return np.zeros(len(seeds))

    G = tiny_runs.build_networks().G_ema
    monitor = Monitor({"reward": measure}, G, seeds=range(4))
    torch.manual_seed(123)
    tick(monitor, 1)
    assert torch.equal(seen[0], seen[1]) and seen[0].shape[0] == 4
