"""Several processes give what one gives, and end together: equality, signals, a dead rank, a restart by
torchrun.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.rewards.cache import ObservationCache
from tests import tiny_runs
from tests.rejections import check_message, raising
from tests.tiny_runs import build_networks, train_flags
from training import checkpoint, storage
from training.distributed import SINGLE, Ranks
from training.phases import Layout, RowDraws

RUN = "import sys, train; train.main(sys.argv[1:])"
TEN = ("--kimg=0.04", "--tick=0.02", "--snap=0", "--no-summary")  # 10 iterations of 4 images, two checkpoints

# Sums over a batch are added up in another order, 1e-7 apart. Three iterations keep that; then a leaky ReLU
# or |sigma - sigma_ref| flips its sign at a value that is zero but for rounding, and Adam without momentum
# makes a small gradient's change as large a share of a step.
MAGNIFIED_ROUNDING = 5e-4


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    code: str, *flags: str, world: int = 2, repo: Path = Path(train.__file__).parent
) -> list[subprocess.Popen]:
    """The processes that torchrun would start, without its own."""
    env = {**os.environ, "PYTHONPATH": f"{repo}:{repo / 'tools'}", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(world)} for i in range(world)]
    return [
        subprocess.Popen([sys.executable, "-c", code, *flags], env={**env, **rank}, **pipes) for rank in ranks
    ]


def finish(processes: list[subprocess.Popen], codes: tuple[int, ...] = (0, 0)) -> list[tuple[str, str]]:
    try:
        output = [p.communicate(timeout=300) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert tuple(p.returncode for p in processes) == codes, output
    return output


def one_process(*flags: str) -> None:
    result = CliRunner().invoke(train.main, list(flags))
    assert result.exit_code == 0, result.output


def only_run(outdir: Path) -> Path:
    (folder,) = outdir.iterdir()
    return folder


def last_state(outdir: Path) -> dict[str, torch.Tensor]:
    return storage.read_tensors(checkpoint.available(only_run(outdir))[-1], "checkpoint")[0]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter or buffer, in the Euclidean norm."""
    assert a.keys() == b.keys()
    return max(
        float((a[k].double() - b[k].double()).norm() / a[k].double().norm().clamp_min(1e-12)) for k in a
    )


# What a part of a batch draws.


@pytest.mark.parametrize("rows", [range(0, 6, 2), range(1, 6, 2), range(4, 5)])
def test_random_rows_are_those_of_the_whole_batch(rows):
    def draw(m):
        torch.manual_seed(3)
        x = torch.zeros([m, 2])
        u = torch.rand(m * 5, 2).reshape(m, 5, 2)  # five values a sample, as rays have them
        return [
            torch.randn([m, 3]),
            torch.rand([]).expand(m),
            torch.randn_like(x),
            torch.rand_like(x),
            u,
            torch.randn(size=[m, 1]),
        ]

    full_batch = draw(6)
    with RowDraws(rows, 6):
        part = draw(len(rows))
    for a, b in zip(full_batch, part, strict=True):
        assert torch.equal(a[list(rows)], b)


def test_dropout_and_drawn_orders_come_in_blocks():
    # two blocks of four samples
    rows = [1, 3]
    x = torch.randn([8, 40])

    def draw(x):
        torch.manual_seed(0)
        return torch.nn.functional.dropout(x, 0.7), torch.multinomial(torch.full((len(x), 2), 0.5), 1)

    full_batch = draw(x)
    blocks = [1, 3, 5, 7]
    with RowDraws(rows, 4, blocks=True):
        part = draw(x[blocks])
    assert all(torch.equal(a[blocks], b) for a, b in zip(full_batch, part, strict=True))
    with RowDraws(rows, 4), pytest.raises(AssertionError, match="randn"):
        torch.empty(2).normal_()


def test_rounds_cover_the_batch_once_and_keep_minibatch_std_groups():
    world = [Layout(24, Ranks(rank=r, world=3), 4) for r in range(3)]
    assert {(layout.rounds_per_rank, layout.total) for layout in world} == {(2, 6)}
    rows = [list(range(24))[layout.rows(turn)] for layout in world for turn in range(2)]
    assert sorted(sum(rows, [])) == list(range(24)) and {len(r) for r in rows} == {4}
    groups = {frozenset(range(i, 24, 6)) for i in range(6)}  # samples i, i + N/G, ... with G = 4
    assert {frozenset(r) for r in rows} == groups
    for r, layout in enumerate(world):
        mine = list(range(24))[r::3]
        assert [mine[turn :: layout.rounds_per_rank] for turn in range(2)] == rows[2 * r : 2 * r + 2]
    for batch, ranks, size in ((6, Ranks(world=4), None), (8, Ranks(world=2), 3), (2, Ranks(world=3), None)):
        with raising("--batch", str(batch)):
            Layout(batch, ranks, size)


def assert_but_for_rounding(first, second):
    """On some processors a sign flips early and moves a few parameters further; a wrong mean over ranks or
    rounds moves all of them.
    """
    apart = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert apart.quantile(0.99) <= MAGNIFIED_ROUNDING and apart.max() <= 100 * MAGNIFIED_ROUNDING


# Two ranks against one.


@pytest.fixture(scope="module")
def pairs_of_two(tmp_path_factory) -> Path:
    """The tiny networks with minibatch-std groups of 2, which fit into half of a batch of 4; no parameter is
    still at its initial zero.
    """
    nets = build_networks(mbstd_group=2)
    generator = torch.Generator().manual_seed(5)
    for net in (nets.G, nets.D):
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    nets.G_ema.load_state_dict(nets.G.state_dict())
    path = tmp_path_factory.mktemp("networks") / "tiny2.safetensors"
    tiny_runs.networks.save(path, nets)
    return path


@pytest.fixture(scope="module", params=["RLHF", pytest.param("GAN", marks=pytest.mark.long)])
def two_ranks(request, tiny_data, pairs_of_two, tiny_reward, tmp_path_factory):
    """Flags of a run of ten iterations, without its folder, and the folder in which two ranks ran it."""
    reward = [
        "--reward=sigma",
        f"--reward-ckpt={tiny_reward}",
        "--lambda-r=1",
        "--set=reward_shaping=reference",
    ]
    reward = reward if request.param == "RLHF" else ["--reward=none"]
    outdir = tmp_path_factory.mktemp(request.param)
    more = ("--glr=0.0005", "--dlr=0.0005", "--style-mixing-prob=0.5", "--aug=ada", *reward)

    def flags(folder: Path) -> list[str]:
        return train_flags(tiny_data, pairs_of_two, folder, *TEN, *more)

    output = finish(start(RUN, *flags(outdir)))
    return flags, outdir, output


@pytest.mark.long
def test_two_ranks_equal_two_rounds_of_one_rank_to_the_last_bit(two_ranks, tmp_path):
    flags, outdir, _ = two_ranks
    one_process(*flags(tmp_path), "--batch-gpu=2")
    expected = last_state(tmp_path)
    got = last_state(outdir)
    assert [k for k in expected if not torch.equal(expected[k], got[k])] == []


def test_two_ranks_equal_one_rank_at_the_same_batch(two_ranks, tmp_path):
    flags, outdir, _ = two_ranks
    one_process(*flags(tmp_path))
    parameters = [
        {k: v for k, v in last_state(d).items() if k.split(".")[0] in ("G", "D", "G_ema")}
        for d in (tmp_path, outdir)
    ]
    assert_but_for_rounding(*parameters)
    texts = [(only_run(d) / "stats.jsonl").read_text() for d in (tmp_path, outdir)]
    counts = [re.findall(r'"num": (\d+)', text) for text in texts]
    assert counts[0] == counts[1], "statistics are over all ranks"


def test_rank_zero_alone_prints(two_ranks):
    _, outdir, ((first, _), (second, quiet)) = two_ranks
    assert "2 processes" in first and "tick 2" in first
    assert second == "" and "tick" not in quiet
    assert not (only_run(outdir) / "run.lock").exists()


REWARD = """
import os, sys, torch
from tests.training.test_distributed import reward_training
from training.distributed import process_group
torch.set_num_threads(1)
with process_group(torch.device("cpu"), 2) as ranks:
    found = reward_training(ranks)
    if ranks.is_main:
        torch.save(found, sys.argv[1])
"""


@contextlib.contextmanager
def in_float64() -> Iterator[type[ObservationCache]]:
    """Inside: networks of float64; gives the cache that hands them observations of float64.

    A gradient that is all but zero differs between one and two ranks by the rounding of the sums over the
    batch, and Adam divides it by its own size, so that in float32 some parameters differ by 1 % of a step, by
    the processor's kernels. Float64 leaves such gradients far below Adam's epsilon; of every other one, what
    the transfer as float32 rounds is 1e-7 of it.
    """

    class Cache(ObservationCache):
        def take(self, seeds, device="cpu"):
            return super().take(seeds, device).double()

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield Cache
    finally:
        torch.set_default_dtype(before)


def reward_training(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Two epochs of five steps on toy slabs, whose pairs the ranks cannot share evenly, the last step of an
    epoch with one pair; with high-quality reference samples, dropped features and flips.
    """
    from dataclasses import replace

    from eg3d_rlhf.rewards.network_training import TrainData, train_reward
    from eg3d_rlhf.rewards.presets import Preset
    from eg3d_rlhf.rewards.settings import TrainOptions, with_changes
    from eg3d_rlhf.rewards.slab_presets import HEADS, PRESETS
    from tests.rewards.test_network_training import SHAPE, filled, toy_labels

    pairs = toy_labels(21)
    val = toy_labels(6, 100)
    anchors = toy_labels(3, 500)
    seeds = [s for p in anchors for s in (p.winner, p.loser)]
    PRESETS["rank-test"] = Preset(network=replace(HEADS, slab_shape=SHAPE).to_dict())
    options = with_changes(
        TrainOptions(preset="rank-test"),
        epochs=2,
        patience=2,
        batch=5,
        reference_samples=6,
        drawn_from_epoch=1,
    )
    with in_float64() as cache:
        data = TrainData(
            train=pairs,
            val=val,
            store=filled(pairs, val, cache=cache),
            anchors=seeds,
            reference_store=filled(anchors, cache=cache),
        )
        return train_reward(data, options, ranks=ranks).model.state_dict()


@pytest.mark.long
def test_reward_training_on_two_ranks_equals_one(tmp_path):
    finish(start(REWARD, str(tmp_path / "two.pt")))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    single_rank = reward_training(SINGLE)
    assert {value.dtype for value in single_rank.values()} == {torch.float64}
    assert largest_difference(single_rank, two) <= 1e-5


REWARD_TOOL = "import sys; from eg3d_rlhf.modes.reward_training import train; train(sys.argv[1:])"
REWARD_STOPPED = """
import os, signal, sys
from eg3d_rlhf.rewards import network_training
from eg3d_rlhf.modes.reward_training import train as main
step, count = network_training._step, []
def signalled_step(*args):
    count.append(1)
    if len(count) == 8 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args)
network_training._step = signalled_step
main(sys.argv[1:])
"""


@pytest.mark.long
def test_the_reward_tool_on_two_ranks_draws_the_same_slabs_stops_and_resumes(tiny_networks, tmp_path):
    from eg3d_rlhf.modes.reward_training import train as main
    from eg3d_rlhf.preferences.labels import Preference, write_labels

    labels = write_labels(
        tmp_path / "labels.jsonl", [Preference(winner=2 * i, loser=2 * i + 1) for i in range(24)]
    )
    flags = [
        f"--network={tiny_networks}",
        f"--labels={labels}",
        "--preset=tiny",
        "--epochs=2",
        "--batch=4",
        "--resolution=32",
    ]
    flags.append("--set=slab_batch=5")

    def cached(folder: str) -> list[str]:
        return [*flags, f"--run-dir={tmp_path / folder}", f"--cache={tmp_path / folder}-cache"]

    assert CliRunner().invoke(main, cached("single")).exit_code == 0
    (first, noted), (second, quiet) = finish(start(REWARD_TOOL, *cached("two")))
    assert "epoch" in first + noted and second == "" and "epoch" not in quiet
    slabs = [
        next((tmp_path / f"{name}-cache").rglob("*.safetensors")).read_bytes() for name in ("single", "two")
    ]
    assert slabs[0] == slabs[1]
    (_, printed), _ = finish(start(REWARD_STOPPED, *cached("stopped")), (130, 130))
    assert "--resume=RUN" in printed
    finish(start(REWARD_TOOL, f"--resume={tmp_path / 'stopped'}"))
    assert (tmp_path / "stopped" / "reward.safetensors").read_bytes() == (
        tmp_path / "two" / "reward.safetensors"
    ).read_bytes()


# Ending together.

PAUSING = """
import os, signal, sys, time, train
from training.loop import TrainingLoop
step = TrainingLoop.step
def signalled_step(self):
    step(self)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if self.batch_idx == 7 and self.ranks.rank == {rank} and first:
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.2)
TrainingLoop.step = signalled_step
train.main(sys.argv[1:])
"""


@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_is_the_straight_one(two_ranks, tmp_path):
    flags, straight, _ = two_ranks
    (printed, _), _ = finish(start(PAUSING.format(rank=1, signal="SIGTERM"), *flags(tmp_path)))
    folder = only_run(tmp_path)
    last = printed.splitlines()[-1]
    assert all(text in last for text in ("SIGTERM", "28 images", f"--resume={folder}")), printed
    assert checkpoint.available(folder)[-1].name == "checkpoint-000000028.safetensors"
    finish(start(RUN, f"--resume={folder}"))
    assert_equal(straight, tmp_path)


def assert_equal(first: Path, second: Path) -> None:
    """Assert bitwise equal final states and statistics."""
    a = last_state(first)
    b = last_state(second)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert (only_run(first) / "stats.jsonl").read_text() == (only_run(second) / "stats.jsonl").read_text()


@pytest.mark.long
def test_a_killed_rank_ends_the_others_with_one_line(two_ranks, tmp_path):
    flags, straight, _ = two_ranks
    started = start(
        PAUSING.format(rank=1, signal="SIGKILL"), *flags(tmp_path), "--set=timeout=0.5", "--workers=1"
    )
    output = finish(started, (2, -signal.SIGKILL))
    errors = [line for line in output[0][1].splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    check_message(errors[0], ("rank 0 of 2", "--resume"))
    finish(start(RUN, f"--resume={only_run(tmp_path)}"))
    assert_equal(straight, tmp_path)


@pytest.mark.long
def test_an_error_of_one_rank_is_said_once(tiny_data, pairs_of_two, tmp_path):
    flags = train_flags(tiny_data, pairs_of_two, tmp_path, *TEN)
    output = finish(start(RUN, *flags, "--batch=5"), (2, 2))
    lines = [line for _, err in output for line in err.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    check_message(lines[0], ("--batch", "2 processes", "5"))
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def torchrun(*flags: str, code: str, folder: Path):
    """torchrun with two processes; yields its process."""
    script = folder / "script.py"
    script.write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
        str(script),
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_and_the_run_continues(two_ranks, tmp_path, rank):
    flags, straight, _ = two_ranks
    (tmp_path / "runs").mkdir()
    code = PAUSING.format(rank=rank, signal="SIGKILL")
    with torchrun(*flags(tmp_path / "runs"), code=code, folder=tmp_path) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"{only_run(tmp_path / 'runs')}" in errors and "checkpoint-" in errors
    assert_equal(straight, tmp_path / "runs")


@pytest.mark.long
def test_terminating_torchrun_leaves_a_checkpoint(two_ranks, tmp_path):
    flags, straight, _ = two_ranks
    (tmp_path / "runs").mkdir()
    with torchrun(*flags(tmp_path / "runs"), code=RUN, folder=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("tick 1"):
                process.terminate()
                break
        printed, errors = process.communicate(timeout=300)
    assert "SIGTERM" in printed and f"--resume={only_run(tmp_path / 'runs')}" in printed, errors
    finish(start(RUN, f"--resume={only_run(tmp_path / 'runs')}"))
    assert_equal(straight, tmp_path / "runs")
