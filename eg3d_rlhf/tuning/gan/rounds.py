"""Preference rounds: label shapes of the current generator, train the rewards anew on all labels so far, tune again; several times.

A reward knows the shapes that it was trained on; the tuned generator makes others, and there the reward errs. Each round asks again where
the generator is now. Rewards start from scratch on everything that was labelled, and tuning starts again from the pretrained network, held
to it by the consistency term: gains of earlier rounds are in the labels, not in the weights (or `--round-start=last`: the weights go on,
the reference stays the pretrained network). Labels of later rounds lose contrast, since better shapes differ less: the annotator keeps
the noise of the first round, and the ledger says how many labels are wrong. Scales of the rounds' rewards differ: never compare raw ones.

This file knows the order of the steps and the ledger; what a step does is handed in (eg3d_rlhf.modes.gan_rounds).
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Protocol

from eg3d_rlhf.core.cli import file_hash
from training import storage
from training.config import check_knobs, knob

ROUNDS = "Preference rounds"  # title of its flags
LEDGER = "ledger.json"
SYNTHETIC, PEOPLE = "synthetic", "people"
PRETRAINED, LAST = "pretrained", "last"
STEPS = ("labels", "reward", "tuned")  # of a round, in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """How many rounds there are, and what one consists of."""

    rounds: int = knob(0, "Rounds of labels, rewards and tuning by --kimg each; 0: tune once, with --reward-ckpt.", ROUNDS, low=0)
    round_pairs: int = knob(400, "Pairs to label in each round.", ROUNDS, metavar="PAIRS", low=1, high=10**5)
    round_labels: str = knob(SYNTHETIC, "Who labels: the programmatic annotator, or people, for whom the run waits.", ROUNDS, choices=(
        SYNTHETIC, PEOPLE))  # fmt: skip
    round_doubtful: float = knob(
        0.5, "Share of pairs over which the last round's rewards disagree; the others, and the first round's, are random.", ROUNDS,
        metavar="0..1", low=0, high=1,
    )
    round_members: int = knob(5, "Rewards in an ensemble.", ROUNDS, low=1, high=100)
    round_preset: str | None = knob(None, "Rewards' architecture, see tools/train_reward.py.", ROUNDS, metavar="NAME", shown="its default")
    round_aggregate: str | None = knob(
        None, "What the ensemble's scores become.", ROUNDS, metavar="NAME", shown="the mean of raw scores; see tools/train_reward.py"
    )
    round_start: str = knob(PRETRAINED, "Network that tuning starts from.", ROUNDS, choices=(PRETRAINED, LAST))

    def __post_init__(self):
        check_knobs(self)


class Ledger:
    """What the rounds of a run have done, in its folder: an entry per round, with the hash of every file that later steps read.

    Raises: ValueError, one line, where the ledger or a file that it names is not as the run wrote it.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / LEDGER
        self.rounds: list[dict] = []
        if self.path.is_file():
            self._read()

    def _read(self) -> None:
        edited = f"{self.path}: expected the ledger as the run wrote it, got another. Restore the file, or start a new run."
        try:
            values = json.loads(self.path.read_text())
            rounds, digest = values["rounds"], values["sha256"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(edited) from None
        if digest != self._digest(rounds):
            raise ValueError(edited)
        for entry in rounds:
            for file in (file for step in STEPS for file in entry.get(step, {}).get("files", [])):
                self._check(entry["round"], *file)
        self.rounds = rounds

    def _check(self, number: int, name: str, expected: str) -> None:
        path = self.folder / name
        got = file_hash(path) if path.is_file() else "nothing"
        if got != expected:
            raise ValueError(
                f"{path}: expected the file of round {number} that the ledger names ({expected[:12]}...), got {got[:12]}. Restore it, or "
                "start a new run."
            )

    @staticmethod
    def _digest(rounds: list[dict]) -> str:
        return hashlib.sha256(json.dumps(rounds, sort_keys=True).encode()).hexdigest()

    def note(self, entry: dict, step: str, found: dict, files: list[Path]) -> None:
        """Write down a step of the last round. Args: files: that it has written and later steps read, inside the run's folder."""
        entry[step] = {**found, "files": [[path.relative_to(self.folder).as_posix(), file_hash(path)] for path in files]}
        text = json.dumps({"rounds": self.rounds, "sha256": self._digest(self.rounds)}, indent=2, sort_keys=True)
        storage.write_atomic(self.path, (text + "\n").encode())

    def entry(self, number: int) -> dict:
        """The entry of a round, a new one where it is the next."""
        if number > len(self.rounds):
            self.rounds.append({"round": number})
        return self.rounds[number - 1]

    def files(self, step: str) -> list[Path]:
        """The first file of a step in every round so far that has done it: labels, rewards, tuned networks."""
        return [self.folder / entry[step]["files"][0][0] for entry in self.rounds if step in entry]


class Work(Protocol):
    """The steps of a round. Each returns figures for the ledger and the files that it wrote, or None where it has to wait.

    A step that was cut off is begun again, and then ends as it would have.
    """

    def labels(self, number: int, ledger: Ledger) -> tuple[dict, list[Path]] | None: ...

    def reward(self, number: int, ledger: Ledger) -> tuple[dict, list[Path]] | None: ...

    def tuned(self, number: int, ledger: Ledger) -> tuple[dict, list[Path]] | None: ...


def run_rounds(count: int, ledger: Ledger, work: Work) -> bool:
    """Do what is left of `count` rounds, noting every step when it is done. Returns whether all is done; False: a step has to wait."""
    for number in range(1, count + 1):
        entry = ledger.entry(number)
        for step in STEPS:
            if step in entry:
                continue
            done = getattr(work, step)(number, ledger)
            if done is None:
                return False
            ledger.note(entry, step, *done)
    return True


def table(ledger: Ledger) -> list[str]:
    """Lines that show the rounds side by side; the watch's figures are changes since the untuned generator, of one round's own reward."""
    lines = ["round  labels  pooled  noise   test   distance  watch"]
    for entry in ledger.rounds:
        labels, reward, tuned = (entry.get(step, {}) for step in STEPS)
        noise, test = labels.get("noise"), reward.get("test_accuracy")
        watch = "  ".join(f"{name} {value:+.3f}" for name, value in tuned.get("watch", {}).items())
        shown = ["-" if value is None else form.format(value) for value, form in ((noise, "{:.3f}"), (test, "{:.3f}"))]
        distance = f"{tuned['distance']:.3f}" if "distance" in tuned else "-"
        lines.append(
            f"{entry['round']:<5d}  {labels.get('count', 0):<6d}  {reward.get('pooled', 0):<6d}  {shown[0]:<6s}  {shown[1]:<5s}  "
            f"{distance:<8s}  {watch}"
        )
    return lines
