"""Preference rounds. Each round labels samples of the current generator, trains rewards and tunes the
generator.

A reward is accurate on samples that are similar to its training samples. A tuned generator makes different
samples, on which the reward errs. Each round therefore labels samples of the current generator.

In each round the rewards are trained from scratch on the labels of all rounds so far. The tuning starts again
from the pretrained network, and the density-consistency term limits its distance from that network. A later
round gains from earlier rounds through their labels, and not through their weights. With `round_start=last`
the tuning starts from the tuned network of the round before, while the reference remains the pretrained
network.

Pairs of later rounds are harder to label, because better shapes differ less. The simulated annotator uses the
noise level of the first round in all rounds, and the ledger records which share of the labels is wrong.
Rewards of different rounds have different scales, so their raw scores cannot be compared.

The folder of a run contains:

    round-1/labels.jsonl    labels of round 1
    round-1/pooled.jsonl    labels of round 1 and of all rounds before it
    round-1/reward/         training of the rewards, in the form that tools/train_reward.py writes
    round-1/tuning/         training of the generator, in the form that train.py writes
    ledger/                 record of every finished step, with the hashes of its files (experiments/store.py)
    ledger.json             the same record in one file, for people to read
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eg3d_rlhf.core.cli import choose_device, file_hash, prefix_errors
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
# Steps of a round, in order. They are names of methods of `Rounds`, and keys of the ledger.
STEPS = ("labels", "reward", "tuned")
PSI = 1.0  # truncation of the samples that are labelled
Done = tuple[dict, list[Path]]  # results for the ledger, and the files that a step wrote
# Function that tunes a generator. Its arguments are the settings and the folder of a round's tuning.
Tune = Callable[[Settings, Path], Any]


class Ledger:
    """Record of the finished steps of a run.

    Every finished step is an artefact of a store in <folder>/ledger. Each artefact depends on the artefact of
    the step before it. The file ledger.json shows all steps, with the hash of every file that later steps
    read. A run of version 0.1 has the file ledger.json only; its steps are then copied into a new store.

    Args:
        folder: folder of the run.
    Raises: ValueError if the ledger or a file that it lists has changed since the run wrote it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / LEDGER
        # `hashed=False`: the store does not name folders by hash; `_artefact_name` gives them readable names.
        self.store = Store(folder / "ledger", hashed=False)
        # One entry per round: {"round": number, name of a finished step: its results}.
        self.rounds: list[dict] = []
        self._last = ""  # content hash of the last finished step, on which the next step depends
        # Only a run of version 0.1 has the file without the folder.
        if self.path.is_file() and not self.store.root.exists():
            self._import_version_0_1()
        # Each step depends on the step before it, so reading ends at the first round that is not complete.
        while self._read_round():
            pass

    def _read_round(self) -> bool:
        """Read the finished steps of the next round into `rounds`.

        Returns: True if all steps of the round are finished.
        """
        entry: dict[str, Any] = {"round": len(self.rounds) + 1}
        for step in STEPS:
            artefact = self.store.find(self._artefact_name(entry, step), {"after": self._last})
            if artefact is None:
                break
            entry[step] = version_0_1.ledger_step(artefact.record)
            self._last = artefact.content
        # The entry has the key "round", and one key for each finished step.
        if len(entry) > 1:
            self.rounds.append(entry)
        return len(entry) == 1 + len(STEPS)

    def _import_version_0_1(self) -> None:
        """Copy the steps that version 0.1 recorded in ledger.json into a new store.

        Raises: ValueError if ledger.json or a file that it lists has changed since the run wrote it.
        """
        try:
            ledger_json = json.loads(self.path.read_text())
            rounds = ledger_json["rounds"]
            is_intact = ledger_json["sha256"] == json_hash(rounds)
        except (ValueError, KeyError, TypeError):
            is_intact = False
        if not is_intact:
            raise ValueError(
                f"{self.path}: the ledger has changed since the run wrote it. Restore the file from a copy,"
                " or start a new run."
            )
        # The new store is made in a temporary folder, which is renamed at the end. If a file fails its check,
        # no part of the store remains.
        final_store = self.store
        self.store = Store(self.folder / "ledger.tmp", hashed=False)
        for entry in rounds:
            for step in STEPS:
                if step not in entry:
                    continue
                for name, recorded_hash in entry[step]["files"]:
                    path = self.folder / name
                    if not path.is_file() or file_hash(path) != recorded_hash:
                        raise ValueError(
                            f"{path}: the file is missing, or has changed since {LEDGER} recorded its hash."
                            " Restore the file from a copy, or start a new run."
                        )
                self._finish(entry, step)
        # A ledger without any step has no folder to rename.
        if self._last:
            self.store.root.rename(final_store.root)
        self.store = final_store
        self._last = ""  # the constructor reads the steps again, from the first one

    @staticmethod
    def _artefact_name(entry: dict, step: str) -> str:
        """Return the name of a step's folder in the store."""
        return f"round-{entry['round']}-{step}"

    def _finish(self, entry: dict, step: str) -> None:
        """Add a finished step to the store."""
        files = [self.folder / name for name, _ in entry[step]["files"]]
        artefact_folder = self.store.root / self._artefact_name(entry, step)
        finished = self.store.finish(artefact_folder, {"after": self._last}, files, entry[step])
        self._last = finished["content"]

    def note(self, entry: dict, step: str, results: dict, files: list[Path]) -> None:
        """Record that a step of the last round is finished.

        Args:
            entry: entry of the last round in `rounds`, to which the step is added.
            step: name of the step, one of `STEPS`.
            results: numbers and texts for the ledger, as values for JSON.
            files: files that the step wrote and later steps read, inside the run's folder.
        """
        entry[step] = {
            **results,
            "files": [[path.relative_to(self.folder).as_posix(), file_hash(path)] for path in files],
        }
        # The store is written first, since a resumed run reads it. ledger.json is only for people to read.
        self._finish(entry, step)
        self.show()

    def show(self) -> None:
        """Write ledger.json."""
        ledger_json = {"rounds": self.rounds, "sha256": json_hash(self.rounds)}
        text = json.dumps(ledger_json, indent=2, sort_keys=True) + "\n"
        storage.write_atomic(self.path, text.encode())

    def files(self, step: str) -> list[Path]:
        """Return the main file of a step in every round that has finished it: labels, reward, or network.

        The list is in the order of the rounds.
        """
        # "files" is a list of [name, hash]. Each step lists its main file first.
        return [self.folder / entry[step]["files"][0][0] for entry in self.rounds if step in entry]


def run_rounds(count: int, ledger: Ledger, work: "Rounds") -> bool:
    """Run the steps of `count` rounds that are not finished, and record each step when it is finished.

    Args:
        count: number of rounds.
        ledger: record of the finished steps.
        work: object with one method for each step.
    Returns: True if all rounds are finished; False if a step waits for people, or a signal ended it.
    """
    for number in range(1, count + 1):
        # The last round of the ledger may be incomplete; it is then continued.
        if number > len(ledger.rounds):
            ledger.rounds.append({"round": number})
        entry = ledger.rounds[number - 1]
        for step in STEPS:
            if step in entry:
                continue
            done = getattr(work, step)(number, ledger)  # the method has the name of the step
            if done is None:
                return False
            ledger.note(entry, step, *done)
    ledger.show()
    return True


def table(ledger: Ledger) -> list[str]:
    """Return the lines of a text table with one row per round.

    The last column contains the held-out metrics, as changes since the untuned generator. "reward" in that
    column is the reward of the row's own round, so its values in different rows cannot be compared.
    """
    lines = ["round  labels  pooled  noise   test   distance  changes since the untuned generator"]
    for entry in ledger.rounds:
        labels, reward, tuned = (entry.get(step, {}) for step in STEPS)
        changes = "  ".join(f"{name} {value:+.3f}" for name, value in tuned.get("monitored", {}).items())
        # A dash stands for a missing number: people's labels have no noise, unfinished rounds no accuracy.
        noise, test_accuracy, distance = (
            "-" if number is None else f"{number:.3f}"
            for number in (labels.get("noise"), reward.get("test_accuracy"), tuned.get("distance"))
        )
        lines.append(
            f"{entry['round']:<5d}  {labels.get('count', 0):<6d}  {reward.get('pooled', 0):<6d} "
            f" {noise:<6s}  {test_accuracy:<5s}  {distance:<8s}  {changes}"
        )
    return lines


# Steps of a round


def check(s: Settings, ranks: Ranks) -> None:
    """Check the settings, data, networks and rewards of all rounds before the first round begins.

    An error then appears at once, and not after hours in a later round.

    Args:
        s: settings of the run.
        ranks: processes of the run.
    Raises: ValueError naming the flag whose value is wrong.
    """
    if ranks.world > 1:
        raise ValueError(
            f"--rounds works in a single process only, but {ranks.world} processes were started. Start"
            " train.py without torchrun."
        )
    config = s.rounds
    kind = s.reward.reward
    # The objects that the rounds will use are made and dropped here, because their constructors check the
    # values.
    with prefix_errors("--round-pairs"):
        for number in range(1, config.rounds + 1):
            pairing(s, number, doubt=True)
        # Raises an error if there are too few pairs for the training, validation and test splits of a reward.
        # The seeds 2 i and 2 i + 1 stand for the two samples of pair i.
        split_by_seed([Preference(winner=2 * i, loser=2 * i + 1) for i in range(config.round_pairs)])
    with prefix_errors("--round-preset"):
        default_options(config.round_preset, kind)
    with prefix_errors("--round-aggregate"):
        RewardRun(members=config.round_members, aggregate=config.round_aggregate)
    if config.round_labels == PEOPLE:
        people()
    # Opening the data set also renders it, if it is synthetic and not in the cache.
    nets = gan.open_networks(s, gan.open_dataset(s).resolution)
    check_fit(nets, s.gan, s.loop, 1)
    if s.reward.heldout_reward is not None:
        with prefix_errors("--heldout-reward"):
            check_reward(load_reward(s.reward.heldout_reward), load_generator(pretrained(s)).generator)


def pretrained(s: Settings) -> Path:
    """Return the path of the network that the run starts from."""
    return find_network(None if s.net.init == "bundled" else s.net.init)


def people():
    """Import the labelling application, in which people label, and return its module `launch`.

    Raises: ValueError if the packages of the labelling application are not installed.
    """
    # Imported here and not above, because these packages are an optional dependency.
    try:
        from eg3d_rlhf.people.label import launch
    except ImportError as error:
        raise ValueError(
            f"--round-labels=people needs the labelling application, which cannot be imported: {error}."
            " Install it with pip install eg3d-rlhf[label]."
        ) from None
    return launch


def pairing(s: Settings, number: int, doubt: bool, rewards: tuple[str, ...] = ()) -> PairingOptions:
    """Return the settings by which the pairs of a round are made. Rounds have no seeds of samples in common.

    Args:
        s: settings of the run.
        number: number of the round, from 1.
        doubt: True to choose a share of the pairs by the disagreement of rewards; False for random pairs
            only.
        rewards: paths of the files of these rewards.
    """
    config = s.rounds
    # Pairs with a known answer (gold) and practice pairs check and train people. A simulated annotator needs
    # none.
    control_pairs: dict[str, Any] = {} if config.round_labels == PEOPLE else {"gold": 0, "training": 0}
    active_options: dict[str, Any] = {}
    if doubt and config.round_doubtful > 0:
        active_options = {"strategy": "active", "doubtful": config.round_doubtful, "rewards": rewards}
    seed = derive_seed(s.loop.seed, "round", number) % MAX_SEED
    make_options = partial(PairingOptions, pairs=config.round_pairs, psi=PSI, seed=seed, **control_pairs)
    # Active pairing needs more seeds than random pairing. With its number of seeds as the distance between
    # the first seeds of two rounds, their seeds never overlap.
    seeds_per_round = make_options(strategy="active").seeds
    return make_options(
        first_seed=PairingOptions.first_seed + (number - 1) * seeds_per_round, **active_options
    )


class Rounds:
    """Steps of the rounds of a run: labels, reward, tuned.

    Each step returns results for the ledger and the files that it wrote, with its main file first. It returns
    None if it waits for people or if a signal ended it. An interrupted step starts again, and gives the same
    result.

    Args:
        s: settings of the run.
        folder: folder of the run.
        tune: function that tunes a generator in a folder, or resumes the tuning that this folder contains.
    """

    def __init__(self, s: Settings, folder: Path, tune: Tune):
        self.s = s
        self.folder = folder
        self.tune = tune
        self.device = choose_device(s.run.device)
        self.pretrained_path = pretrained(s)  # network file of --init, which the first round labels

    def round_folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / f"round-{number}"

    def networks(self, number: int, ledger: Ledger) -> list[Path]:
        """Return the network files whose samples rounds 1 to `number` label, in the order of the rounds."""
        # Round 1 labels samples of the initial network, round k + 1 samples of the network that round k
        # tuned.
        return [self.pretrained_path, *ledger.files("tuned")][:number]

    # Labels.

    def labels(self, number: int, ledger: Ledger) -> Done | None:
        """Label pairs of samples of the current generator, by people or by the simulated annotator."""
        rewards = self._pair_choosing_rewards(number, ledger)
        options = pairing(self.s, number, bool(rewards), rewards)
        generator = load_generator(self.networks(number, ledger)[-1], self.device)
        label_pairs = self._label_by_people if self.s.rounds.round_labels == PEOPLE else self._annotate
        done = label_pairs(number, ledger, generator, options)
        if done is None:
            return None
        results, files = done
        return {"by": self.s.rounds.round_labels, "generator": generator.hash, **results}, files

    def _pair_choosing_rewards(self, number: int, ledger: Ledger) -> tuple[str, ...]:
        """Return the path of the ensemble whose disagreement chooses pairs of a round, in a tuple.

        The tuple is empty in the first round, which has no rewards yet, and if the last ensemble has one
        member only, since disagreement needs two.
        """
        files = ledger.files("reward")[: number - 1]  # rewards of the rounds before this one
        return (str(files[-1]),) if files and len(load_reward(files[-1]).members()) > 1 else ()

    def _annotate(
        self, number: int, ledger: Ledger, generator: LoadedGenerator, options: PairingOptions
    ) -> Done:
        """Label pairs by the simulated annotator, with the noise level of the first round."""
        planned: Plan = plan(
            options, generator, ensemble=reward_ensemble(options, generator) if options.rewards else None
        )
        seed_pairs = [(pair.first.seed, pair.second.seed) for pair in planned.pairs]
        annotation_options = AnnotationOptions(pairs=len(seed_pairs), seed=options.seed)
        # None in the first round: the annotator then calibrates its temperature, and later rounds reuse that
        # value.
        temperature = ledger.rounds[0].get("labels", {}).get("temperature")
        with tqdm(total=2 * len(seed_pairs), unit="seed", desc=f"round {number}: simulating labels") as bar:
            annotation = annotate(
                generator.generator,
                annotation_options,
                lambda _: bar.update() and None,  # called once per evaluated sample; has to return None
                pairs=seed_pairs,
                temperature=temperature,
            )
        path = write_labels(
            self.round_folder(number) / "labels.jsonl", annotation.preferences(generator.hash)
        )
        results = {
            "count": len(seed_pairs),
            # Share of labels that differ from the noise-free order.
            "noise": sum(not label.clean for label in annotation.labels) / len(seed_pairs),
            "temperature": annotation.temperature,
            "utility": float(annotation.utilities.mean()),
            "chosen_by_doubt": len(planned.report.get("why", ())),
            "disagreement": planned.report.get("disagreement_chosen"),
        }
        return results, [path]

    def _label_by_people(
        self, number: int, ledger: Ledger, generator: LoadedGenerator, options: PairingOptions
    ) -> Done | None:
        """Let people label pairs.

        The first call for a round creates a labelling project, prints the command that opens it for people,
        and returns None. A later call reads their answers.

        Raises: ValueError naming --resume if answers are missing, or are too few to train a reward.
        """
        launch = people()
        name = f"round-{number}"
        # The database of the labelling project is a file in the run's folder.
        url = f"sqlite:///{(self.folder / 'labels.db').resolve()}"
        # True if the project was created now, so that it has no answers yet.
        if launch.make_round(url, name, generator.path, options):
            print(f"Round {number} waits for people. Label with: {launch.label_command(url, name)}")
            print(f"Then continue with: python train.py --resume={self.folder}", flush=True)
            return None
        with prefix_errors("--resume"):
            labels = launch.round_labels(url, name, generator, options.pairs)
            # Raises an error if the answers are too few for the splits of a reward, before they are recorded.
            split_by_seed([*self._recorded_labels(ledger), *labels])
        path = write_labels(self.round_folder(number) / "labels.jsonl", labels)
        ties = sum(label.tie for label in labels)  # pairs that people called equal
        doubtful_pairs = round(options.pairs * options.doubtful) if options.rewards else 0
        # The noise of people's labels is unknown, because there is no ground truth.
        results = {"count": len(labels), "ties": ties, "noise": None, "chosen_by_doubt": doubtful_pairs}
        return results, [path]

    @staticmethod
    def _recorded_labels(ledger: Ledger) -> list[Preference]:
        """Return the labels of all rounds in the ledger, in the order of the rounds."""
        labels: list[Preference] = []
        for path in ledger.files("labels"):
            labels += load_labels(path)
        return labels

    # Rewards.

    def reward(self, number: int, ledger: Ledger) -> Done | None:
        """Train the ensemble of rewards of a round, on the labels of all rounds so far."""
        labels = self._recorded_labels(ledger)
        pooled_path = write_labels(self.round_folder(number) / "pooled.jsonl", labels)
        run_folder = self.round_folder(number) / "reward"
        config = self.s.rounds
        kind = self.s.reward.reward
        # Labels refer to the generator of their samples by its hash, so the training needs all generators.
        network, *later_networks = self.networks(number, ledger)
        settings = RewardRun(
            network=network,
            more_networks=tuple(later_networks),
            labels=LabelSource.from_file(pooled_path),
            observation=kind,
            members=config.round_members,
            aggregate=config.round_aggregate,
            train=with_changes(default_options(config.round_preset, kind), seed=self.s.loop.seed),
        )
        print(f"Round {number}: training {settings.members} rewards on {len(labels)} labels.", flush=True)
        # A training that has begun wrote the file of its options; it is then resumed.
        begin_or_resume = TRAINING.resume if (run_folder / OPTIONS).is_file() else TRAINING.begin
        try:
            begin_or_resume(settings, run_folder, Flags({"device": self.device.type}))
        except StoppedError as stopped:
            print(f"{str(stopped).capitalize()}. Continue with --resume={self.folder}", flush=True)
            return None
        report = json.loads((run_folder / REPORT).read_text())
        # Accuracy on the test split against the noise-free order, which only simulated labels have, or else
        # against the labels themselves.
        noise_free_test = report["test"].get("clean")
        label_test = report["test"]["labels"]
        results = {
            "pooled": len(labels),
            "labels": report["labels_sha256"],
            "splits": report["splits"],
            "members": settings.members,
            "test_accuracy": (noise_free_test or label_test)["accuracy"],
            "test_against": "noise-free order" if noise_free_test else "labels",
        }
        return results, [run_folder / "reward.safetensors", run_folder / "reward.json", pooled_path]

    # Tuning.

    def tuned(self, number: int, ledger: Ledger) -> Done | None:
        """Tune a generator by the rewards of the round.

        The tuning starts from the pretrained network, or with round_start=last from the network of the round
        before. The reference is the pretrained network in both cases.
        """
        folder = self.round_folder(number) / "tuning"
        settings = self.settings(number, ledger)
        print(f"Round {number}: tuning.", flush=True)
        self.tune(settings, folder)  # begins the tuning, or resumes the tuning that the folder contains
        stats_file = folder / STATS
        stats_lines = stats_file.read_text().splitlines() if stats_file.is_file() else []
        ticks = [version_0_1.gan_stats(json.loads(line)) for line in stats_lines]
        # The tuning is incomplete: a signal ended it before its last tick.
        if not ticks or ticks[-1]["nimg"] < round(settings.loop.kimg * 1000):
            print(f"Continue with --resume={self.folder}", flush=True)
            return None
        path = find_network(folder)
        tuned = load_generator(path, self.device)  # the last network, or the network that an early stop kept
        untuned = load_generator(self.pretrained_path, self.device)
        # The ledger records the metrics of the tick at which the network was saved. With an early stop this
        # need not be the last tick.
        tick = next((tick for tick in ticks if tick["nimg"] == tuned.nets.cur_nimg), ticks[-1])
        monitored = {
            name.removeprefix(PREFIX): value["mean"]
            for name, value in tick.items()
            if name.startswith(PREFIX)
        }
        # The ledger has an entry of its own for the distance. It is measured below, because only runs with an
        # early stop log the distance at every tick.
        monitored.pop("distance", None)
        distance = consistency(tuned.G, untuned.G, settings.reward.terms.consistency_resolution)
        results = {
            "generator": tuned.hash,
            "images": tuned.nets.cur_nimg,
            "distance": float(distance.mean()),
            "monitored": monitored,
            "start": self.s.rounds.round_start,
        }
        return results, [path]

    def settings(self, number: int, ledger: Ledger) -> Settings:
        """Return the settings of a round's tuning.

        They are the settings of the run, with the rewards of the round. Only the last round writes a summary.
        """
        s = self.s
        start_settings = {}
        # The first round has no tuned network yet, so it starts from the pretrained network in any case.
        if s.rounds.round_start == LAST and number > 1:
            last_tuned = ledger.files("tuned")[number - 2]  # the list starts with round 1, at index 0
            start_settings = {"init": str(last_tuned), "reference": str(self.pretrained_path)}
        tuning_settings = s.changed(
            reward_ckpt=str(ledger.files("reward")[number - 1]),
            # The run's summary is made from that of its last round only.
            no_summary=s.run.no_summary or number < s.rounds.rounds,
            **start_settings,
        )
        # The tuning itself is a run without rounds.
        return dataclasses.replace(tuning_settings, rounds=RoundConfig())


def work(s: Settings, run: Run, tune: Tune) -> None:
    """Run the rounds that are not finished. If all are finished, write the summary and print the table.

    Args:
        s: settings of the run.
        run: the run, with its folder.
        tune: function that tunes a generator in a folder, or resumes the tuning that this folder contains.
    """
    print(f"{s.rounds.rounds} rounds of {s.rounds.round_pairs} pairs.", flush=True)
    ledger = Ledger(run.folder)
    if run_rounds(s.rounds.rounds, ledger, Rounds(s, run.folder, tune)):
        # The summary of the run is the summary of its last round and the ledger of all rounds. The last round
        # has no summary with --no-summary.
        last_tuning = run.folder / f"round-{s.rounds.rounds}" / "tuning"
        summary_file = last_tuning / SUMMARY
        summary = version_0_1.summary(json.loads(summary_file.read_text())) if summary_file.is_file() else {}
        run.write(SUMMARY, {**summary, "rounds": ledger.rounds, "seconds": time.time() - run.began})
        print("\n" + "\n".join(table(ledger)))
        print(
            f"\nThe files {LEDGER} and {SUMMARY} were written to {run.folder}. For reports on the last round,"
            f" pass --run={last_tuning}.",
            flush=True,
        )
