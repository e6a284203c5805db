"""How far a stage's training is, and what it writes: lines, warnings, resumable states, the best parameters so far, the finished policy.

    training_options.json    what the run was begun with
    stats.jsonl              a line per `log_every` updates and per win rate; equal runs give equal bytes
    timing.jsonl             the same lines' seconds
    warnings.json            by name, each with the update that it was seen at
    checkpoint-*.safetensors, kept-*.safetensors    while it runs: states to go on from, and the parameters with the best win rate
    policy/, result.json     when it is finished
One process of the run writes.
"""

import json
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eg3d_rlhf.flow.dpo import TIME_BINS
from eg3d_rlhf.flow.tuning.update import BINNED, TrainConfig
from training import checkpoint, storage
from training.records import format_time

OPTIONS, STATS, TIMING, WARNINGS, RESULT, POLICY = (
    "training_options.json", "stats.jsonl", "timing.jsonl", "warnings.json", "result.json", "policy"
)  # fmt: skip
FREE = ("batch_gpu", "checkpoint_every")  # settings that a resumed run may change
KEPT = "kept parameters"


def begun(folder: Path) -> bool:
    """Whether a folder holds a training, finished or not."""
    return (folder / OPTIONS).exists()


def read_result(folder: Path) -> dict | None:
    """What a finished training says of itself, and its lines; None of another."""
    if not (folder / RESULT).exists():
        return None
    lines = [json.loads(line) for line in (folder / STATS).read_text().splitlines()]
    return {**json.loads((folder / RESULT).read_text()), "stats": lines}


class TrainingFolder:
    """The files of one training.

    Args:
        folder: its own; steps: updates in all; say: prints a line.
    """

    def __init__(self, folder: Path, steps: int, say: Callable[[str], None]):
        self.folder, self.steps, self.say = folder, steps, say
        self.lines: list[dict] = []  # of stats.jsonl
        self.warnings: dict[str, str] = {}
        self._start = (0, time.monotonic())
        self._named: list[int] = []  # updates whose parameters the states on the disk name

    # Options.

    def begin(self, options: Mapping, resume: bool) -> None:
        """Write the options of a new run, or compare them with those that it was begun with.

        Raises: ValueError for a folder with a run in it that is not to be resumed, or a run of other options.
        """
        if not begun(self.folder):
            storage.write_atomic(self.folder / OPTIONS, (json.dumps(options, indent=1, sort_keys=True) + "\n").encode())
            return
        if not resume:
            raise ValueError(f"train_stage: expected a new folder, got {self.folder} with a run in it. Resume it, or name another.")
        before, now = (_flat(json.loads(json.dumps(o))) for o in (json.loads((self.folder / OPTIONS).read_text()), options))
        differ = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
        changed = sorted(name for name in differ if name.split(".")[-1] not in FREE)
        if changed:
            got = "; ".join(f"{name} {now.get(name)} instead of {before.get(name)}" for name in changed[:4])
            raise ValueError(f"train_stage({self.folder}): expected what the run was begun with, got {got}. Use that, or another folder.")

    # Lines.

    def line(self, record: dict, eta_steps: int) -> None:
        """One line of stats.jsonl, and a status line."""
        self.lines.append(record)
        with open(self.folder / STATS, "a") as file:
            file.write(json.dumps(record, sort_keys=True) + "\n")
        done, seconds = record["step"] - self._start[0], time.monotonic() - self._start[1]
        rate = seconds / done if done else 0.0
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        with open(self.folder / TIMING, "a") as file:
            file.write(json.dumps({"step": record["step"], "seconds": seconds, "sec_per_step": rate, "mem_gb": memory}) + "\n")
        self.say(status(record, self.steps, rate, rate * eta_steps))

    def warn(self, found: Mapping[str, str]) -> None:
        """Print and keep the warnings that are new."""
        fresh = {name: text for name, text in found.items() if name not in self.warnings}
        for name, text in fresh.items():
            self.say(f"Warning ({name}): {text}")
        if fresh:
            self.warnings |= fresh
            self._write_warnings()

    def _write_warnings(self) -> None:
        storage.write_atomic(self.folder / WARNINGS, (json.dumps(self.warnings, indent=1) + "\n").encode())

    def go_on(self, meta: Mapping) -> None:
        """Continue where a state was written: later lines and warnings are dropped."""
        storage.remove_temporaries(self.folder)
        stats = self.folder / STATS
        text = stats.read_text(errors="replace").splitlines(keepends=True)[: meta["lines"]] if stats.exists() else []
        storage.write_atomic(stats, "".join(text).encode())
        self.lines, self.warnings = [json.loads(line) for line in text], dict(meta["warnings"])
        self._write_warnings()
        self._start, self._named = (meta["progress"]["step"], time.monotonic()), [meta["progress"]["kept_step"]]

    # States.

    def checkpoint(self, step: int, tensors: dict[str, torch.Tensor], progress: Mapping) -> None:
        """A state to go on from; the last two are kept, and the parameters that they name."""
        meta = {"progress": progress, "lines": len(self.lines), "warnings": self.warnings}
        checkpoint.write(self.folder, step, tensors, meta)
        self._named = [*self._named, progress["kept_step"]][-checkpoint.KEEP :]
        for path in self.folder.glob("kept-*.safetensors"):
            if path not in [self.kept_path(named) for named in self._named]:
                path.unlink()

    def latest(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """The newest state that is whole; None before the first."""
        if not checkpoint.available(self.folder):
            return None
        tensors, meta, _ = checkpoint.read(self.folder, fall_back=True)
        return tensors, meta

    def kept_path(self, step: int) -> Path:
        """Where the parameters after `step` updates are kept."""
        return self.folder / f"kept-{step:09d}.safetensors"

    def keep(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keep parameters."""
        storage.write_tensors(self.kept_path(step), KEPT, tensors, {"step": step})

    def kept(self, step: int) -> dict[str, torch.Tensor]:
        """Those parameters."""
        return storage.read_tensors(self.kept_path(step), KEPT)[0]

    def finish(self, result: Mapping) -> None:
        """Say that the run is finished, then delete what was there to go on from."""
        storage.write_atomic(self.folder / RESULT, (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())
        for path in [*checkpoint.available(self.folder), *self.folder.glob("kept-*.safetensors")]:
            path.unlink()


def status(record: Mapping, steps: int, seconds: float, eta: float) -> str:
    """The fixed-width line of a record."""
    fields = {"step": f"{record['step']:>6d}/{steps:<6d}"}
    for name, short, form in (
        ("loss", "loss", "<8.4f"), ("implicit_accuracy", "accuracy", "<5.3f"), ("margin", "margin", "<+9.2e"),
        ("w_diff", "w_diff", "<+9.2e"), ("l_diff", "l_diff", "<+9.2e"), ("grad_norm", "grad", "<8.2e"), ("win_rate", "win_rate", "<6.3f"),
    ):  # fmt: skip
        value = record.get(name)
        text = "" if value is None else format(value, form)
        fields[short] = text.ljust(int(form.lstrip("<+").split(".")[0]))
    fields |= {"sec/step": f"{seconds:<7.3f}", "eta": format_time(eta) if seconds else ""}
    return " ".join(f"{k} {v}" for k, v in fields.items())


def _flat(values: Mapping, name: str = "") -> dict[str, object]:
    """Nested values by dotted name."""
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= _flat(value, f"{name}{key}.") if isinstance(value, dict) else {f"{name}{key}": value}
    return found


@dataclass
class Progress:
    """What changes besides tensors; JSON."""

    step: int = 0  # updates done
    kept_step: int = 0  # with the best win rate; the last where there is no judge
    best: float | None = None  # that win rate
    since_best: int = 0  # win rates since
    ended: bool = False  # by the win rate
    sums: dict = field(default_factory=dict)  # of the line under way

    def add(self, figures: dict) -> None:
        """Count an update's figures into the line under way."""
        self.sums = _added(self.sums, {"updates": 1, **figures})

    def judged(self, rate: float, config: TrainConfig) -> bool:
        """Note a win rate; whether it is the best so far. A tie goes to the earlier."""
        best = self.best is None or rate > self.best
        if best:
            self.best, self.kept_step, self.since_best = rate, self.step, 0
        else:
            self.since_best += 1
        self.ended = self.since_best >= config.patience or rate < self.best - config.max_drop
        return best

    def line(self, lr: float, rate: float | None) -> dict:
        """The record of the line under way, which ends with it."""
        sums, self.sums = self.sums, {}
        record = {"step": self.step, "pairs": sums.get("pairs", 0)}
        if sums:
            record |= {name: sums[name] / sums["updates"] for name in ("loss", "grad_norm")} | _binned(sums["bins"]) | {"lr": lr}
        return record if rate is None else {**record, "win_rate": rate}


def _added(a: Mapping, b: dict) -> dict:
    """Sums of numbers, and of lists of them, in nested values."""
    if not a:
        return b
    plus = {dict: _added, list: lambda x, y: [p + q for p, q in zip(x, y, strict=True)]}
    return {k: plus[type(v)](a[k], v) if type(v) in plus else a[k] + v for k, v in b.items()}


def _binned(bins: Mapping[str, list[float]]) -> dict:
    """Means over all pairs, and per bin of times, from sums; a bin without pairs has none."""
    if not bins:
        return {}
    pairs, total = bins["pairs"], math.fsum(bins["pairs"])
    names = [name for name in BINNED if name != "pairs"]
    means = {name: math.fsum(bins[name]) / total for name in names}
    per_bin = {name: [bins[name][i] / pairs[i] if pairs[i] else None for i in range(TIME_BINS)] for name in names}
    return {**means, "time_bins": {"pairs": pairs, **per_bin}}
