"""Preference rounds: label samples of the current generator, train rewards on all labels so far, tune;
repeat.

A reward is accurate on samples like those that it was trained on. The tuned generator makes other ones, on
which the reward errs. Each round therefore labels samples of the current generator.

Rewards are trained from scratch on all labels so far. Tuning starts again from the pretrained network, and
the consistency term keeps it near that network. Gains of earlier rounds are in the labels, not in the
weights. With `--round-start=last` the weights continue from the last round, while the reference stays the
pretrained network.

Labels of later rounds have less contrast, since better shapes differ less. The simulated annotator keeps the
noise of the first round, and the ledger states how many labels are wrong. Rewards of different rounds have
different scales: never compare raw scores.

    round-1/labels.jsonl    labels of the round
    round-1/pooled.jsonl    the same, with those of all rounds before
    round-1/reward/         training of the rewards, in the form that tools/train_reward.py writes
    round-1/tuning/         training of the generator, in the form that train.py writes
    ledger/                 every finished step, with the hashes of its files (experiments/store.py)
    ledger.json             the same in one file, for people
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
# Steps of a round, in order. They are methods of `Rounds` and keys of the ledger.
STEPS = ("labels", "reward", "tuned")
PSI = 1.0  # truncation of the samples that are labelled
Done = tuple[dict, list[Path]]  # figures for the ledger, and files that the step wrote
Tune = Callable[[Settings, Path], Any]  # function of the settings and of the folder of a round's tuning


class Ledger:
    """Record of the rounds of a run.

    Every step is an artefact of a store in <folder>/ledger, which depends on the step before it. ledger.json
    shows all of them, with the hash of every file that later steps read. A run of version 0.1 has that file
    only.

    Raises: ValueError, in one line, if the ledger or a file in it is not as the run wrote it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / LEDGER
        # `hashed=False`: the store does not name folders by hash; `_kind` gives them readable names.
        self.store = Store(folder / "ledger", hashed=False)
        self.rounds: list[dict] = []
        self._last = ""  # content hash of the last finished step, on which the next step depends
        # Only a run of version 0.1 has the file without the folder.
        if self.path.is_file() and not self.store.root.exists():
            self._adopt()
        # The steps form a chain: the first one that is missing ends it.
        while self._read_round():
            pass

    def _read_round(self) -> bool:
        """Read the finished steps of the next round. Returns whether the round is complete."""
        entry: dict[str, Any] = {"round": len(self.rounds) + 1}
        for step in STEPS:
            artefact = self.store.find(self._kind(entry, step), {"after": self._last})
            if artefact is None:
                break
            entry[step] = version_0_1.ledger_step(artefact.record)
            self._last = artefact.content
        if len(entry) > 1:
            self.rounds.append(entry)
        return len(entry) == 1 + len(STEPS)

    def _adopt(self) -> None:
        """Enter the steps that version 0.1 wrote into ledger.json."""
        try:
            values = json.loads(self.path.read_text())
            rounds = values["rounds"]
            is_intact = values["sha256"] == json_hash(rounds)
        except (ValueError, KeyError, TypeError):
            is_intact = False
        if not is_intact:
            raise ValueError(
                f"{self.path}: the ledger is not as the run wrote it. Restore the file, or start a new run."
            )
        # Entered in a temporary folder that is renamed at the end:
        # if a file fails its check, nothing is entered.
        final = self.store
        self.store = Store(self.folder / "ledger.tmp", hashed=False)
        for entry in rounds:
            for step in (step for step in STEPS if step in entry):
                changed = [
                    name
                    for name, digest in entry[step]["files"]
                    if not (self.folder / name).is_file() or file_hash(self.folder / name) != digest
                ]
                if changed:
                    raise ValueError(
                        f"{self.folder / changed[0]}: the file is missing, or is not the one in {LEDGER}."
                        " Restore it, or start a new run."
                    )
                self._finish(entry, step)
        if self._last:
            self.store.root.rename(final.root)
        self.store = final
        self._last = ""

    @staticmethod
    def _kind(entry: dict, step: str) -> str:
        """Return the name of a step's folder in the store."""
        return f"round-{entry['round']}-{step}"

    def _finish(self, entry: dict, step: str) -> None:
        """Enter a finished step into the store."""
        files = [self.folder / name for name, _ in entry[step]["files"]]
        kind = self._kind(entry, step)
        done = self.store.finish(self.store.root / kind, {"after": self._last}, files, entry[step])
        self._last = done["content"]

    def note(self, entry: dict, step: str, figures: dict, files: list[Path]) -> None:
        """Record a step of the last round.

        Args:
            entry: the round.
            step: name of the step.
            figures: results, as JSON.
            files: files that it wrote and later steps read, inside the run's folder.
        """
        entry[step] = {
            **figures,
            "files": [[path.relative_to(self.folder).as_posix(), file_hash(path)] for path in files],
        }
        # The store first: ledger.json is written from it and never read by this version.
        self._finish(entry, step)
        self.show()

    def show(self) -> None:
        """Write ledger.json."""
        values = {"rounds": self.rounds, "sha256": json_hash(self.rounds)}
        storage.write_atomic(self.path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())

    def files(self, step: str) -> list[Path]:
        """Return the first file of a step (labels, rewards, networks) from every round that has it."""
        return [self.folder / entry[step]["files"][0][0] for entry in self.rounds if step in entry]


def run_rounds(count: int, ledger: Ledger, work: "Rounds") -> bool:
    """Do the remaining steps of `count` rounds, and record each when it is finished.

    Returns whether all are finished. False: a step has to wait, for people or after a signal.
    """
    for number in range(1, count + 1):
        # The last recorded round may be incomplete; it is continued.
        if number > len(ledger.rounds):
            ledger.rounds.append({"round": number})
        entry = ledger.rounds[number - 1]
        for step in STEPS:
            if step in entry:
                continue
            done = getattr(work, step)(number, ledger)  # the method of this name
            if done is None:
                return False
            ledger.note(entry, step, *done)
    ledger.show()
    return True


def table(ledger: Ledger) -> list[str]:
    """Return lines that show the rounds side by side.

    The last column holds the held-out metrics, as changes since the untuned generator. Its reward is that of
    the row's own round, so rewards of different rows cannot be compared.
    """
    lines = ["round  labels  pooled  noise   test   distance  changes since the untuned generator"]
    for entry in ledger.rounds:
        labels, reward, tuned = (entry.get(step, {}) for step in STEPS)
        noise = labels.get("noise")
        test = reward.get("test_accuracy")
        changes = "  ".join(f"{name} {value:+.3f}" for name, value in tuned.get("monitored", {}).items())
        # A dash where a round has no such figure: people's labels
        # have no noise, unfinished rounds no accuracy.
        shown = [
            "-" if value is None else form.format(value)
            for value, form in ((noise, "{:.3f}"), (test, "{:.3f}"))
        ]
        distance = f"{tuned['distance']:.3f}" if "distance" in tuned else "-"
        lines.append(
            f"{entry['round']:<5d}  {labels.get('count', 0):<6d}  {reward.get('pooled', 0):<6d} "
            f" {shown[0]:<6s}  {shown[1]:<5s}  {distance:<8s}  {changes}"
        )
    return lines


# Steps of a round


def check(s: Settings, ranks: Ranks) -> None:
    """Check data, networks, rewards and seeds before the first round, so that no error stops a later one.

    Raises: ValueError naming the flag.
    """
    if ranks.world > 1:
        raise ValueError(f"--rounds works in a single process, got {ranks.world}. Start without torchrun.")
    config = s.rounds
    kind = s.reward.reward
    # The same objects as in the rounds are made and dropped: their constructors check themselves.
    with naming("--round-pairs"):
        for number in range(1, config.rounds + 1):
            pairing(s, number, doubt=True)
        # Pairs must be enough for the three splits of the reward's training.
        split_by_seed([Preference(winner=2 * i, loser=2 * i + 1) for i in range(config.round_pairs)])
    with naming("--round-preset"):
        default_options(config.round_preset, kind)
    with naming("--round-aggregate"):
        RewardRun(members=config.round_members, aggregate=config.round_aggregate)
    if config.round_labels == PEOPLE:
        people()
    # Also renders the data set, if it is synthetic, and reads the initial networks.
    nets = gan.open_networks(s, gan.open_dataset(s).resolution)
    check_fit(nets, s.gan, s.loop, 1)
    if s.reward.heldout_reward is not None:
        with naming("--heldout-reward"):
            check_reward(load_reward(s.reward.heldout_reward), load_generator(pretrained(s)).generator)


def pretrained(s: Settings) -> Path:
    """Return the path of the network that the run starts from."""
    return find_network(None if s.net.init == "bundled" else s.net.init)


def people():
    """Import the labelling application, which label campaigns need.

    Raises: ValueError if its packages are missing.
    """
    # Imported here: its packages are an optional dependency.
    try:
        from eg3d_rlhf.people.label import launch
    except ImportError as error:
        raise ValueError(
            f"--round-labels=people needs the labelling tool, which cannot be imported: {error}. Install it"
            " with pip install eg3d-rlhf[label]."
        ) from None
    return launch


def pairing(s: Settings, number: int, doubt: bool, rewards: tuple[str, ...] = ()) -> PairingOptions:
    """Return the settings of the pairs of a round. Every round has its own seeds.

    Args:
        s: settings of the run.
        number: round, from 1.
        doubt: let rewards choose a share of the pairs by their disagreement.
        rewards: files of these rewards.
    """
    config = s.rounds
    # Control questions are for people. A simulated annotator needs none.
    known: dict[str, Any] = {} if config.round_labels == PEOPLE else {"gold": 0, "training": 0}
    share: dict[str, Any] = {}
    if doubt and config.round_doubtful > 0:
        share = {"strategy": "active", "doubtful": config.round_doubtful, "rewards": rewards}
    seed = derive_seed(s.loop.seed, "round", number) % MAX_SEED  # the text is part of the random stream
    of_round = partial(PairingOptions, pairs=config.round_pairs, psi=PSI, seed=seed, **known)
    # Active pairing needs the most seeds. With its number as stride, seeds of rounds never overlap.
    stride = of_round(strategy="active").seeds
    return of_round(first_seed=PairingOptions.first_seed + (number - 1) * stride, **share)


class Rounds:
    """Steps of the rounds, in the folder of a run.

    Each step returns figures for the ledger and the files that it wrote, or None if it has to wait. A step
    that was interrupted begins again, with the same result.

    Args:
        s: settings of the run.
        folder: the run's folder.
        tune: function that tunes a generator in a folder, or resumes there.
    """

    def __init__(self, s: Settings, folder: Path, tune: Tune):
        self.s = s
        self.folder = folder
        self.tune = tune
        self.device = choose_device(s.run.device)
        self.first = pretrained(s)  # network file of the first round

    def round_folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / f"round-{number}"

    def networks(self, number: int, ledger: Ledger) -> list[Path]:
        """Return the generators whose samples rounds up to `number` have labelled, this round's last."""
        # Round 1 labels the initial network, round k + 1 the network that round k tuned.
        return [self.first, *ledger.files("tuned")][:number]

    # Labels.

    def labels(self, number: int, ledger: Ledger) -> Done | None:
        """Label pairs of samples of the current generator."""
        rewards = self._doubters(number, ledger)
        options = pairing(self.s, number, bool(rewards), rewards)
        generator = load_generator(self.networks(number, ledger)[-1], self.device)
        label = self._ask if self.s.rounds.round_labels == PEOPLE else self._annotate
        done = label(number, ledger, generator, options)
        return done and ({"by": self.s.rounds.round_labels, "generator": generator.hash, **done[0]}, done[1])

    def _doubters(self, number: int, ledger: Ledger) -> tuple[str, ...]:
        """Return the file of the rewards whose disagreement chooses pairs.

        There is none in the first round, and none if there is a single reward.
        """
        files = ledger.files("reward")[: number - 1]
        return (str(files[-1]),) if files and len(load_reward(files[-1]).members()) > 1 else ()

    def _annotate(
        self, number: int, ledger: Ledger, generator: LoadedGenerator, options: PairingOptions
    ) -> Done:
        """Label by the simulated annotator, with the noise of the first round."""
        planned: Plan = plan(
            options, generator, ensemble=reward_ensemble(options, generator) if options.rewards else None
        )
        pairs = [(pair.first.seed, pair.second.seed) for pair in planned.pairs]
        asked = AnnotationOptions(pairs=len(pairs), seed=options.seed)
        # None in the first round: the annotator then calibrates its temperature, which later rounds keep.
        known = ledger.rounds[0].get("labels", {}).get("temperature")
        with tqdm(total=2 * len(pairs), unit="seed", desc=f"round {number}: simulating labels") as bar:
            annotation = annotate(
                generator.generator, asked, lambda _: bar.update() and None, pairs=pairs, temperature=known
            )
        path = write_labels(
            self.round_folder(number) / "labels.jsonl", annotation.preferences(generator.hash)
        )
        figures = {
            "count": len(pairs),
            # Share of labels that differ from the noise-free order.
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
        """Let people label.

        The first call creates a campaign, prints how to label it, and returns None. A later call reads the
        answers.
        """
        campaigns = people()
        name = f"round-{number}"
        # The campaign's database is a file in the run folder.
        url = f"sqlite:///{(self.folder / 'labels.db').resolve()}"
        if campaigns.make_round(url, name, generator.path, options):
            print(f"Round {number} waits for people. Label with: {campaigns.label_command(url, name)}")
            print(f"Then continue with: python train.py --resume={self.folder}", flush=True)
            return None
        with naming("--resume"):
            labels = campaigns.round_labels(url, name, generator, options.pairs)
            # Raises an error now if the answers are too few to train on, not after the reward has begun.
            split_by_seed(
                [*(label for path in ledger.files("labels") for label in load_labels(path)), *labels]
            )
        path = write_labels(self.round_folder(number) / "labels.jsonl", labels)
        # People may call a pair equal; noise is unknown without ground truth.
        ties = sum(label.tie for label in labels)
        doubted = round(options.pairs * options.doubtful) if options.rewards else 0
        return {"count": len(labels), "ties": ties, "noise": None, "chosen_by_doubt": doubted}, [path]

    # Rewards.

    def reward(self, number: int, ledger: Ledger) -> Done | None:
        """Train the rewards on the labels of all rounds so far."""
        labels = [label for path in ledger.files("labels") for label in load_labels(path)]
        pooled = write_labels(self.round_folder(number) / "pooled.jsonl", labels)
        out = self.round_folder(number) / "reward"
        config = self.s.rounds
        kind = self.s.reward.reward
        # Labels refer to generators by hash, so the training needs all of them.
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
        # The options file exists once a training has begun: then it is resumed.
        begin_or_resume = TRAINING.go_on if (out / OPTIONS).is_file() else TRAINING.begin
        try:
            begin_or_resume(settings, out, Flags({"device": self.device.type}))
        except StoppedError as stopped:
            print(f"{str(stopped).capitalize()}. Continue with --resume={self.folder}", flush=True)
            return None
        report = json.loads((out / REPORT).read_text())
        test = report["test"]["labels"]
        clean = report["test"].get("clean")  # only simulated labels have a noise-free order
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
        """Tune a generator with the round's rewards, from the pretrained network or from the last one.

        The reference is the pretrained network in either case.
        """
        folder = self.round_folder(number) / "tuning"
        settings = self.settings(number, ledger)
        print(f"Round {number}: tuning.", flush=True)
        self.tune(settings, folder)  # begins, or resumes what is in the folder
        ticks = (
            [version_0_1.gan_stats(json.loads(line)) for line in (folder / STATS).read_text().splitlines()]
            if (folder / STATS).is_file()
            else []
        )
        # A signal ended the tuning before its last tick.
        if not ticks or ticks[-1]["nimg"] < round(settings.loop.kimg * 1000):
            print(f"Continue with --resume={self.folder}", flush=True)
            return None
        path = find_network(folder)
        after = load_generator(path, self.device)  # the tuned network, or the one that an early stop kept
        before = load_generator(self.first, self.device)
        # An early stop may have kept an earlier snapshot; the metrics of its tick are the ones that count.
        tick = next((tick for tick in ticks if tick["nimg"] == after.nets.cur_nimg), ticks[-1])
        monitored = {
            name.removeprefix(PREFIX): value["mean"]
            for name, value in tick.items()
            if name.startswith(PREFIX)
        }
        # The distance is a figure of its own below, and is measured
        # again: only an early stop logs it per tick.
        monitored.pop("distance", None)
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
        """Return the settings of a round's tuning: those of the run, with the round's rewards.

        Only the last round writes a summary.
        """
        s = self.s
        more = {}
        # From the second round on: the first one has no last network.
        if s.rounds.round_start == LAST and number > 1:
            more = {"init": str(ledger.files("tuned")[number - 2]), "reference": str(self.first)}
        # Only the summary of the last round is needed.
        no_summary = s.run.no_summary or number < s.rounds.rounds
        changed = s.changed(
            reward_ckpt=str(ledger.files("reward")[number - 1]), no_summary=no_summary, **more
        )
        # A round's tuning is a run without rounds.
        return dataclasses.replace(changed, rounds=RoundConfig())


def work(s: Settings, run: Run, tune: Tune) -> None:
    """Run all rounds, write the summary and print the table."""
    print(f"{s.rounds.rounds} rounds of {s.rounds.round_pairs} pairs.", flush=True)
    ledger = Ledger(run.folder)
    if run_rounds(s.rounds.rounds, ledger, Rounds(s, run.folder, tune)):
        # The run's summary is that of its last round, with the ledger of all rounds.
        last = run.folder / f"round-{s.rounds.rounds}" / "tuning"
        summary = (
            version_0_1.summary(json.loads((last / SUMMARY).read_text()))
            if (last / SUMMARY).is_file()
            else {}
        )
        run.write(SUMMARY, {**summary, "rounds": ledger.rounds, "seconds": time.time() - run.began})
        print("\n" + "\n".join(table(ledger)))
        print(
            f"\nWritten to {run.folder}: {LEDGER}, {SUMMARY}. Run of the last round, for reports: {last}",
            flush=True,
        )
