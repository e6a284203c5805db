"""Preference rounds: label shapes of the current generator, train the rewards anew on all labels so far, tune
again; several times.

A reward knows the shapes that it was trained on; the tuned generator makes others, and there the reward errs.
Each round asks again where the generator is now. Rewards start from scratch on everything that was labelled,
and tuning starts again from the pretrained network, held to it by the consistency term: gains of earlier
rounds are in the labels, not in the weights (or `--round-start=last`: the weights go on, the reference stays
the pretrained network). Labels of later rounds lose contrast, since better shapes differ less: the annotator
keeps the noise of the first round, and the ledger says how many labels are wrong. Scales of the rounds'
rewards differ: never compare raw ones.

    round-1/labels.jsonl    the round's own labels
    round-1/pooled.jsonl    with those of all rounds before
    round-1/reward/         the rewards' training, as tools/train_reward.py leaves it
    round-1/tuning/         the generator's, as train.py leaves it
    ledger/                 every finished step, with the hashes of what it made (experiments/store.py)
    ledger.json             the same in one file, to read
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eg3d_rlhf.core.cli import choose_device, file_hash, naming
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.mode import Flags
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import OPTIONS, STATS, Run
from eg3d_rlhf.experiments.store import Store, json_hash
from eg3d_rlhf.generators import LoadedGenerator, find_network, load_generator
from eg3d_rlhf.people.label.pairing import PairingOptions, Plan, plan, reward_ensemble
from eg3d_rlhf.preferences.dataset import split_by_seed
from eg3d_rlhf.preferences.labels import MAX_SEED, LabelSource, Preference, load_labels, write_labels
from eg3d_rlhf.preferences.settings import AnnotationOptions
from eg3d_rlhf.preferences.synthetic import annotate
from eg3d_rlhf.rewards.reward import check_reward, load_reward
from eg3d_rlhf.rewards.settings import RewardRun, default_options, with_changes
from eg3d_rlhf.rewards.training_run import REPORT, TRAINING
from eg3d_rlhf.tuning.gan import reward_run as gan
from eg3d_rlhf.tuning.gan.early_stop import consistency
from eg3d_rlhf.tuning.gan.heldout_metrics import PREFIX
from eg3d_rlhf.tuning.gan.settings import LAST, PEOPLE, RoundConfig, Settings
from training import storage
from training.distributed import Ranks
from training.gan import check_fit
from training.phases import derive_seed
from training.progress import tqdm

LEDGER = "ledger.json"
SUMMARY = "summary.json"
STEPS = ("labels", "reward", "tuned")  # of a round, in order
PSI = 1.0  # truncation of the shapes that are labelled
Done = tuple[dict, list[Path]]
Tune = Callable[[Settings, Path], Any]  # settings, folder of a round's tuning


class Ledger:
    """Record of the rounds of a run: every step is an artefact of a store in <folder>/ledger, which
    depends on the step before it. ledger.json shows all of them, with the hash of every file that later steps
    read; a run of version 0.1 has that file alone.

    Raises: ValueError, one line, where the ledger or a file that it names is not as the run wrote it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / LEDGER
        self.store = Store(folder / "ledger", hashed=False)
        self.rounds: list[dict] = []
        self._last = ""  # content of the last finished step
        if self.path.is_file() and not self.store.root.exists():
            self._adopt()
        while self._read_round():
            pass

    def _read_round(self) -> bool:
        """Read the finished steps of the next round; returns whether it is finished."""
        entry: dict[str, Any] = {"round": len(self.rounds) + 1}
        for step in STEPS:
            found = self.store.find(self._kind(entry, step), {"after": self._last})
            if found is None:
                break
            entry[step] = version_0_1.ledger_step(found.record)
            self._last = found.content
        if len(entry) > 1:
            self.rounds.append(entry)
        return len(entry) == 1 + len(STEPS)

    def _adopt(self) -> None:
        """Enter the steps that version 0.1 has written into ledger.json."""
        try:
            values = json.loads(self.path.read_text())
            rounds = values["rounds"]
            whole = values["sha256"] == json_hash(rounds)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(
                f"{self.path}: expected the ledger as the run wrote it, got another. Restore the file, or"
                " start a new run."
            )
        final = self.store
        self.store = Store(self.folder / "ledger.tmp", hashed=False)  # all or nothing
        for entry in rounds:
            for step in (step for step in STEPS if step in entry):
                changed = [
                    name
                    for name, digest in entry[step]["files"]
                    if not (self.folder / name).is_file() or file_hash(self.folder / name) != digest
                ]
                if changed:
                    raise ValueError(
                        f"{self.folder / changed[0]}: expected the file that {LEDGER} names, got another or"
                        " none. Restore it, or start a new run."
                    )
                self._finish(entry, step)
        if self._last:
            self.store.root.rename(final.root)
        self.store = final
        self._last = ""

    @staticmethod
    def _kind(entry: dict, step: str) -> str:
        return f"round-{entry['round']}-{step}"

    def _finish(self, entry: dict, step: str) -> None:
        files = [self.folder / name for name, _ in entry[step]["files"]]
        kind = self._kind(entry, step)
        done = self.store.finish(self.store.root / kind, {"after": self._last}, files, entry[step])
        self._last = done["content"]

    def note(self, entry: dict, step: str, figures: dict, files: list[Path]) -> None:
        """Write down a step of the last round.

        Args: files: that it has written and later steps read, inside the run's folder.
        """
        entry[step] = {
            **figures,
            "files": [[path.relative_to(self.folder).as_posix(), file_hash(path)] for path in files],
        }
        self._finish(entry, step)
        self.show()

    def show(self) -> None:
        """Write ledger.json."""
        values = {"rounds": self.rounds, "sha256": json_hash(self.rounds)}
        storage.write_atomic(self.path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())

    def files(self, step: str) -> list[Path]:
        """The first file of a step in every round so far that has done it:
        labels, rewards, tuned networks.
        """
        return [self.folder / entry[step]["files"][0][0] for entry in self.rounds if step in entry]


def run_rounds(count: int, ledger: Ledger, work: "Rounds") -> bool:
    """Do what is left of `count` rounds, noting every step when it is done. Returns whether all is done;
    False: a step has to wait.
    """
    for number in range(1, count + 1):
        if number > len(ledger.rounds):
            ledger.rounds.append({"round": number})
        entry = ledger.rounds[number - 1]
        for step in STEPS:
            if step in entry:
                continue
            done = getattr(work, step)(number, ledger)
            if done is None:
                return False
            ledger.note(entry, step, *done)
    ledger.show()
    return True


def table(ledger: Ledger) -> list[str]:
    """Lines that show the rounds side by side; the monitored figures are changes since the untuned generator,
    of one round's own reward.
    """
    lines = ["round  labels  pooled  noise   test   distance  monitored"]
    for entry in ledger.rounds:
        labels, reward, tuned = (entry.get(step, {}) for step in STEPS)
        noise = labels.get("noise")
        test = reward.get("test_accuracy")
        monitored = "  ".join(f"{name} {value:+.3f}" for name, value in tuned.get("monitored", {}).items())
        shown = [
            "-" if value is None else form.format(value)
            for value, form in ((noise, "{:.3f}"), (test, "{:.3f}"))
        ]
        distance = f"{tuned['distance']:.3f}" if "distance" in tuned else "-"
        lines.append(
            f"{entry['round']:<5d}  {labels.get('count', 0):<6d}  {reward.get('pooled', 0):<6d} "
            f" {shown[0]:<6s}  {shown[1]:<5s}  {distance:<8s}  {monitored}"
        )
    return lines


# What a round's steps do.


def check(s: Settings, ranks: Ranks) -> None:
    """Raise ValueError for what would stop a round later:
    data, networks, rewards and seeds that do not fit.
    """
    if ranks.world > 1:
        raise ValueError(f"--rounds: expected one process, got {ranks.world}. Start without torchrun.")
    config = s.rounds
    kind = s.reward.reward
    with naming("--round-pairs"):
        for number in range(1, config.rounds + 1):
            pairing(s, number, doubt=True)
        split_by_seed([Preference(winner=2 * i, loser=2 * i + 1) for i in range(config.round_pairs)])
    with naming("--round-preset"):
        default_options(config.round_preset, kind)
    with naming("--round-aggregate"):
        RewardRun(members=config.round_members, aggregate=config.round_aggregate)
    if config.round_labels == PEOPLE:
        people()
    nets = gan.open_networks(s, gan.open_dataset(s).resolution)
    check_fit(nets, s.gan, s.loop, 1)
    if s.reward.heldout_reward is not None:
        with naming("--heldout-reward"):
            check_reward(load_reward(s.reward.heldout_reward), load_generator(pretrained(s)).generator)


def pretrained(s: Settings) -> Path:
    return find_network(None if s.net.init == "bundled" else s.net.init)


def people():
    """What campaigns need. Raises: ValueError where the labelling application's packages are missing."""
    try:
        from eg3d_rlhf.people.label import launch
    except ImportError as error:
        raise ValueError(
            f"--round-labels=people: expected the labelling tool, got: {error}. pip install eg3d-rlhf[label]."
        ) from None
    return launch


def pairing(s: Settings, number: int, doubt: bool, rewards: tuple[str, ...] = ()) -> PairingOptions:
    """Which pairs a round draws; every round has seeds of its own.

    Args: doubt: whether rewards choose a share of them.
    """
    config = s.rounds
    known: dict[str, Any] = {} if config.round_labels == PEOPLE else {"gold": 0, "training": 0}
    share: dict[str, Any] = {}
    if doubt and config.round_doubtful > 0:
        share = {"strategy": "active", "doubtful": config.round_doubtful, "rewards": rewards}
    seed = derive_seed(s.loop.seed, "round", number) % MAX_SEED
    of_round = partial(PairingOptions, pairs=config.round_pairs, psi=PSI, seed=seed, **known)
    stride = of_round(strategy="active").seeds
    return of_round(first_seed=PairingOptions.first_seed + (number - 1) * stride, **share)


class Rounds:
    """The steps of a round, in the folder of a run. Each returns figures for the ledger and the files that it
    wrote, or None where it has to wait. A step that was cut off is begun again, and then ends as it would
    have. Args: tune: tunes in a folder, or goes on there.
    """

    def __init__(self, s: Settings, folder: Path, tune: Tune):
        self.s = s
        self.folder = folder
        self.tune = tune
        self.device = choose_device(s.run.device)
        self.first = pretrained(s)

    def of(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def networks(self, number: int, ledger: Ledger) -> list[Path]:
        """The generators that rounds up to `number` have labelled, this round's last."""
        return [self.first, *ledger.files("tuned")][:number]

    # Labels.

    def labels(self, number: int, ledger: Ledger) -> Done | None:
        rewards = self._doubters(number, ledger)
        options = pairing(self.s, number, bool(rewards), rewards)
        generator = load_generator(self.networks(number, ledger)[-1], self.device)
        label = self._ask if self.s.rounds.round_labels == PEOPLE else self._annotate
        done = label(number, ledger, generator, options)
        return done and ({"by": self.s.rounds.round_labels, "generator": generator.hash, **done[0]}, done[1])

    def _doubters(self, number: int, ledger: Ledger) -> tuple[str, ...]:
        """File of the rewards whose disagreement chooses pairs; none in the first round, and where there is
        but one reward.
        """
        files = ledger.files("reward")[: number - 1]
        return (str(files[-1]),) if files and len(load_reward(files[-1]).members()) > 1 else ()

    def _annotate(
        self, number: int, ledger: Ledger, generator: LoadedGenerator, options: PairingOptions
    ) -> Done:
        """Labels by the programmatic annotator, with the noise of the first round's."""
        planned: Plan = plan(
            options, generator, ensemble=reward_ensemble(options, generator) if options.rewards else None
        )
        pairs = [(pair.first.seed, pair.second.seed) for pair in planned.pairs]
        asked = AnnotationOptions(pairs=len(pairs), seed=options.seed)
        known = ledger.rounds[0].get("labels", {}).get("temperature")
        with tqdm(total=2 * len(pairs), unit="seed", desc=f"round {number}: judging") as bar:
            annotation = annotate(
                generator.generator, asked, lambda _: bar.update() and None, pairs=pairs, temperature=known
            )
        path = write_labels(self.of(number) / "labels.jsonl", annotation.preferences(generator.hash))
        figures = {
            "count": len(pairs),
            "noise": sum(not label.clean for label in annotation.labels) / len(pairs),
            "temperature": annotation.temperature,
            "utility": float(annotation.utilities.mean()),
            "chosen_by_doubt": len(planned.report.get("why", ())),
            "disagreement": planned.report.get("disagreement_chosen"),
        }
        return figures, [path]

    def _ask(
        self, number: int, ledger: Ledger, generator: LoadedGenerator, options: PairingOptions
    ) -> Done | None:
        """Labels by people: the first call makes a campaign and says how to answer it; a later one reads what
        they have answered.
        """
        campaigns = people()
        name = f"round-{number}"
        url = f"sqlite:///{(self.folder / 'labels.db').resolve()}"
        if campaigns.make_round(url, name, generator.path, options):
            print(f"Round {number} waits for people. Label with: {campaigns.label_command(url, name)}")
            print(f"Then go on with: python train.py --resume={self.folder}", flush=True)
            return None
        with naming("--resume"):
            labels = campaigns.round_labels(url, name, generator, options.pairs)
            split_by_seed(
                [*(label for path in ledger.files("labels") for label in load_labels(path)), *labels]
            )
        path = write_labels(self.of(number) / "labels.jsonl", labels)
        ties = sum(label.tie for label in labels)
        doubted = round(options.pairs * options.doubtful) if options.rewards else 0
        return {"count": len(labels), "ties": ties, "noise": None, "chosen_by_doubt": doubted}, [path]

    # Rewards.

    def reward(self, number: int, ledger: Ledger) -> Done | None:
        labels = [label for path in ledger.files("labels") for label in load_labels(path)]
        pooled = write_labels(self.of(number) / "pooled.jsonl", labels)
        out = self.of(number) / "reward"
        config = self.s.rounds
        kind = self.s.reward.reward
        network, *others = self.networks(number, ledger)
        settings = RewardRun(
            network=network,
            more_networks=tuple(others),
            labels=LabelSource.of_file(pooled),
            observation=kind,
            members=config.round_members,
            aggregate=config.round_aggregate,
            train=with_changes(default_options(config.round_preset, kind), seed=self.s.loop.seed),
        )
        print(f"Round {number}: training {settings.members} rewards on {len(labels)} labels.", flush=True)
        begin_or_go_on = TRAINING.go_on if (out / OPTIONS).is_file() else TRAINING.begin
        try:
            begin_or_go_on(settings, out, Flags({"device": self.device.type}))
        except StoppedError as stopped:
            print(f"{str(stopped).capitalize()}. Continue with --resume={self.folder}", flush=True)
            return None
        report = json.loads((out / REPORT).read_text())
        test = report["test"]["labels"]
        clean = report["test"].get("clean")
        figures = {
            "pooled": len(labels),
            "labels": report["labels_sha256"],
            "splits": report["splits"],
            "members": settings.members,
            "test_accuracy": (clean or test)["accuracy"],
            "test_against": "noise-free order" if clean else "labels",
        }
        return figures, [out / "reward.safetensors", out / "reward.json", pooled]

    # Tuning.

    def tuned(self, number: int, ledger: Ledger) -> Done | None:
        """Tune with the round's rewards, from the pretrained network or the last, held to the pretrained one
        in either case.
        """
        folder = self.of(number) / "tuning"
        settings = self.settings(number, ledger)
        print(f"Round {number}: tuning.", flush=True)
        self.tune(settings, folder)
        ticks = (
            [version_0_1.gan_stats(json.loads(line)) for line in (folder / STATS).read_text().splitlines()]
            if (folder / STATS).is_file()
            else []
        )
        if not ticks or ticks[-1]["nimg"] < round(settings.loop.kimg * 1000):
            print(f"Continue with --resume={self.folder}", flush=True)
            return None
        path = find_network(folder)
        after = load_generator(path, self.device)
        before = load_generator(self.first, self.device)
        tick = next((tick for tick in ticks if tick["nimg"] == after.nets.cur_nimg), ticks[-1])
        monitored = {
            name.removeprefix(PREFIX): value["mean"]
            for name, value in tick.items()
            if name.startswith(PREFIX)
        }
        monitored.pop("distance", None)  # stated apart, whether an early stop took it or not
        distance = consistency(after.G, before.G, settings.reward.terms.consistency_resolution)
        figures = {
            "generator": after.hash,
            "images": after.nets.cur_nimg,
            "distance": float(distance.mean()),
            "monitored": monitored,
            "start": self.s.rounds.round_start,
        }
        return figures, [path]

    def settings(self, number: int, ledger: Ledger) -> Settings:
        """Of a round's tuning: the run's own, with the round's rewards;
        the last round alone is summarised.
        """
        s = self.s
        more = {}
        if s.rounds.round_start == LAST and number > 1:
            more = {"init": str(ledger.files("tuned")[number - 2]), "reference": str(self.first)}
        no_summary = s.run.no_summary or number < s.rounds.rounds
        changed = s.changed(
            reward_ckpt=str(ledger.files("reward")[number - 1]), no_summary=no_summary, **more
        )
        return dataclasses.replace(changed, rounds=RoundConfig())


def work(s: Settings, run: Run, tune: Tune) -> None:
    print(f"{s.rounds.rounds} rounds of {s.rounds.round_pairs} pairs.", flush=True)
    ledger = Ledger(run.folder)
    if run_rounds(s.rounds.rounds, ledger, Rounds(s, run.folder, tune)):
        last = run.folder / f"round-{s.rounds.rounds}" / "tuning"
        summary = (
            version_0_1.summary(json.loads((last / SUMMARY).read_text()))
            if (last / SUMMARY).is_file()
            else {}
        )
        run.write(SUMMARY, {**summary, "rounds": ledger.rounds, "seconds": time.time() - run.began})
        print("\n" + "\n".join(table(ledger)))
        print(
            f"\nWritten to {run.folder}: {LEDGER}, {SUMMARY}. The last round's run, for reports: {last}",
            flush=True,
        )
