"""What a stage's training writes: lines, warnings, resumable states, the best parameters so far, and the finished policy.

    training_options.json    what the run was begun with
    stats.jsonl              a line per `log_every` updates and per win rate; equal runs give equal bytes
    timing.jsonl             the same lines' seconds
    warnings.json            by name, each with the update that it was seen at
    checkpoint-*.safetensors, kept-*.safetensors    while it runs: states to go on from, and the parameters with the best win rate
    policy/, result.json     when it is finished
One process of the run writes.
"""

import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

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


class TrainRecords:
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
