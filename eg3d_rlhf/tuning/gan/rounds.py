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
import sys
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
from eg3d_rlhf.preferences.provenance import EVERYTHING
from eg3d_rlhf.preferences.settings import AnnotationOptions
from eg3d_rlhf.preferences.synthetic import annotate
from eg3d_rlhf.rewards.evaluation import too_few
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
        round_entry: dict[str, Any] = {"round": len(self.rounds) + 1}
        for step in STEPS:
            artefact = self.store.find(self._artefact_name(round_entry, step), {"after": self._last})
            if artefact is None:
                break
            round_entry[step] = version_0_1.ledger_step(artefact.record)
            self._last = artefact.content
        # The entry has the key "round", and one key for each finished step.
        if len(round_entry) > 1:
            self.rounds.append(round_entry)
        return len(round_entry) == 1 + len(STEPS)

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
        for round_entry in rounds:
            for step in STEPS:
                if step not in round_entry:
                    continue
                for name, recorded_hash in round_entry[step]["files"]:
                    path = self.folder / name
                    if not path.is_file() or file_hash(path) != recorded_hash:
                        raise ValueError(
                            f"{path}: the file is missing, or has changed since {LEDGER} recorded its hash."
                            " Restore the file from a copy, or start a new run."
                        )
                self._finish(round_entry, step)
        # A ledger without any step has no folder to rename.
        if self._last:
            self.store.root.rename(final_store.root)
        self.store = final_store
        self._last = ""  # the constructor reads the steps again, from the first one

    @staticmethod
    def _artefact_name(round_entry: dict, step: str) -> str:
        """Return the name of the folder in the store for a step of the round `round_entry`."""
        return f"round-{round_entry['round']}-{step}"

    def _finish(self, round_entry: dict, step: str) -> None:
        """Add a finished step of the round `round_entry` to the store."""
        files = [self.folder / name for name, _ in round_entry[step]["files"]]
        artefact_folder = self.store.root / self._artefact_name(round_entry, step)
        finished_record = self.store.finish(artefact_folder, {"after": self._last}, files, round_entry[step])
        self._last = finished_record["content"]

    def note(self, round_entry: dict, step: str, results: dict, files: list[Path]) -> None:
        """Record that a step of the last round is finished.

        Args:
            round_entry: entry of the last round in `rounds`, to which the step is added.
            step: name of the step, one of `STEPS`.
            results: numbers and texts for the ledger, as values for JSON.
            files: files that the step wrote and later steps read, inside the run's folder.
        """
        round_entry[step] = {
            **results,
            "files": [[path.relative_to(self.folder).as_posix(), file_hash(path)] for path in files],
        }
        # The store is written first, since a resumed run reads it. ledger.json is only for people to read.
        self._finish(round_entry, step)
        self.show()

    def show(self) -> None:
        """Write ledger.json."""
        ledger_json = {"rounds": self.rounds, "sha256": json_hash(self.rounds)}
        ledger_text = json.dumps(ledger_json, indent=2, sort_keys=True) + "\n"
        storage.write_atomic(self.path, ledger_text.encode())

    def files(self, step: str) -> list[Path]:
        """Return the main file (labels, reward, network) of a step for each round that finished the step."""
        # "files" is a list of [name, hash]. Each step lists its main file first.
        return [
            self.folder / round_entry[step]["files"][0][0]
            for round_entry in self.rounds
            if step in round_entry
        ]


def run_rounds(round_count: int, ledger: Ledger, work: "Rounds") -> bool:
    """Run the steps of `round_count` rounds that are not finished, and record each step when it is finished.

    Args:
        round_count: number of rounds.
        ledger: record of the finished steps.
        work: object with one method for each step.
    Returns: True if all rounds are finished; False if a step waits for people, or a signal ended it.
    """
    for round_number in range(1, round_count + 1):
        # The last round of the ledger may be incomplete; it is then continued.
        if round_number > len(ledger.rounds):
            ledger.rounds.append({"round": round_number})
        round_entry = ledger.rounds[round_number - 1]
        for step in STEPS:
            if step in round_entry:
                continue
            step_result = getattr(work, step)(round_number, ledger)  # the method has the name of the step
            if step_result is None:
                return False
            ledger.note(round_entry, step, *step_result)
    ledger.show()
    return True


def table(ledger: Ledger) -> list[str]:
    """Return the lines of a text table with one row for each round.

    The last column contains the held-out metrics, as changes since the untuned generator. The metric "reward"
    is the score of the reward that this round trained, so its values in different rows cannot be compared.
    """
    table_lines = ["round  labels  pooled  noise   test   distance  changes since the untuned generator"]
    for round_entry in ledger.rounds:
        label_results, reward_results, tuning_results = (round_entry.get(step, {}) for step in STEPS)
        change_texts = "  ".join(
            f"{metric} {change:+.3f}" for metric, change in tuning_results.get("monitored", {}).items()
        )
        # A dash stands for a missing number: people's labels have no noise, unfinished rounds no accuracy.
        noise, test_accuracy, distance = (
            "-" if measured_number is None else f"{measured_number:.3f}"
            for measured_number in (
                label_results.get("noise"),
                reward_results.get("test_accuracy"),
                tuning_results.get("distance"),
            )
        )
        table_lines.append(
            f"{round_entry['round']:<5d}  {label_results.get('count', 0):<6d}"
            f"  {reward_results.get('pooled', 0):<6d}  {noise:<6s}  {test_accuracy:<5s}  {distance:<8s}"
            f"  {change_texts}"
        )
    return table_lines


# Steps of a round


def check(settings: Settings, ranks: Ranks) -> None:
    """Check the settings, data, networks and rewards of all rounds before the first round begins.

    An error then appears at once, and not after hours in a later round.

    Args:
        settings: settings of the run.
        ranks: processes of the run.
    Raises: ValueError naming the flag whose value is wrong.
    """
    if ranks.world > 1:
        raise ValueError(
            f"--rounds works in a single process only, but {ranks.world} processes were started. Start"
            " train.py without torchrun."
        )
    config = settings.rounds
    reward_kind = settings.reward.reward
    # The objects that the rounds will use are made and dropped here, because their constructors check the
    # values.
    with prefix_errors("--round-pairs"):
        for round_number in range(1, config.rounds + 1):
            pairing(settings, round_number, by_disagreement=True)
        # Raises an error if there are too few pairs for the training, validation and test splits of a reward.
        # The seeds 2 i and 2 i + 1 represent the two samples of pair i.
        first_splits = split_by_seed(
            [Preference(winner=2 * i, loser=2 * i + 1) for i in range(config.round_pairs)]
        )
    # With so few pairs, the first round's reward is likely to be rejected, after people have labelled.
    if too_few(first_splits.pair_counts(), RewardRun.fractions):
        print(
            f"Warning: --round-pairs={config.round_pairs} are few labels for the first round. If the interval"
            " of its reward's accuracy includes one half, the run stops before tuning; --weak-reward lets it"
            " continue.",
            file=sys.stderr,
            flush=True,
        )
    with prefix_errors("--round-preset"):
        default_options(config.round_preset, reward_kind)
    with prefix_errors("--round-aggregate"):
        RewardRun(members=config.round_members, aggregate=config.round_aggregate)
    if config.round_labels == PEOPLE:
        people()
    # Opening the data set also renders it, if it is synthetic and not in the cache.
    nets = gan.open_networks(settings, gan.open_dataset(settings).resolution)
    check_fit(nets, settings.gan, settings.loop, 1)
    if settings.reward.heldout_reward is not None:
        with prefix_errors("--heldout-reward"):
            check_reward(
                load_reward(settings.reward.heldout_reward), load_generator(pretrained(settings)).generator
            )


def pretrained(settings: Settings) -> Path:
    """Return the path of the network that the run starts from."""
    return find_network(None if settings.net.init == "bundled" else settings.net.init)


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


def pairing(
    settings: Settings, round_number: int, by_disagreement: bool, reward_paths: tuple[str, ...] = ()
) -> PairingOptions:
    """Return the settings by which the pairs of a round are made; no two rounds have samples in common.

    Args:
        settings: settings of the run.
        round_number: number of the round, from 1.
        by_disagreement: True to choose a share of the pairs by the disagreement of rewards; False for random
            pairs only.
        reward_paths: paths of the files of the rewards whose disagreement chooses pairs.
    """
    config = settings.rounds
    # Pairs with a known answer (gold) and practice pairs check and train people. A simulated annotator needs
    # none.
    control_pairs: dict[str, Any] = {} if config.round_labels == PEOPLE else {"gold": 0, "training": 0}
    active_options: dict[str, Any] = {}
    if by_disagreement and config.round_doubtful > 0:
        active_options = {"strategy": "active", "doubtful": config.round_doubtful, "rewards": reward_paths}
    seed = derive_seed(settings.loop.seed, "round", round_number) % MAX_SEED
    make_options = partial(PairingOptions, pairs=config.round_pairs, psi=PSI, seed=seed, **control_pairs)
    # Active pairing needs more seeds than random pairing. With its number of seeds as the distance between
    # the first seeds of two rounds, their seeds never overlap.
    seeds_per_round = make_options(strategy="active").seed_count
    return make_options(
        first_seed=PairingOptions.first_seed + (round_number - 1) * seeds_per_round, **active_options
    )


class Rounds:
    """Steps of the rounds of a run: labels, reward, tuned.

    Each step returns results for the ledger and the files that it wrote, with its main file first. It returns
    None if it waits for people or if a signal ended it. An interrupted step starts again, and gives the same
    result.

    Args:
        settings: settings of the run.
        folder: folder of the run.
        tune: function that tunes a generator in a folder, or resumes the tuning that this folder contains.
    """

    def __init__(self, settings: Settings, folder: Path, tune: Tune):
        self.s = settings
        self.folder = folder
        self.tune = tune
        self.device = choose_device(settings.run.device)
        self.pretrained_path = pretrained(settings)  # network file of --init, which the first round labels

    def round_folder(self, round_number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / f"round-{round_number}"

    def networks(self, round_number: int, ledger: Ledger) -> list[Path]:
        """Return the network files whose samples rounds 1 to `round_number` label, in this order."""
        # Round 1 labels samples of the initial network, round k + 1 samples of the network that round k
        # tuned.
        return [self.pretrained_path, *ledger.files("tuned")][:round_number]

    # Labels.

    def labels(self, round_number: int, ledger: Ledger) -> Done | None:
        """Label pairs of samples of the current generator, by people or by the simulated annotator."""
        reward_paths = self._pair_choosing_rewards(round_number, ledger)
        pairing_options = pairing(self.s, round_number, bool(reward_paths), reward_paths)
        generator = load_generator(self.networks(round_number, ledger)[-1], self.device, self.s.reward.level)
        label_pairs = self._label_by_people if self.s.rounds.round_labels == PEOPLE else self._annotate
        step_result = label_pairs(round_number, ledger, generator, pairing_options)
        if step_result is None:
            return None
        ledger_results, written_files = step_result
        return {
            "by": self.s.rounds.round_labels,
            "generator": generator.hash,
            **ledger_results,
        }, written_files

    def _pair_choosing_rewards(self, round_number: int, ledger: Ledger) -> tuple[str, ...]:
        """Return the path of the ensemble whose disagreement chooses pairs of a round, in a tuple.

        The tuple is empty in the first round, which has no rewards yet, and if the last ensemble has one
        member only, since disagreement needs two.
        """
        reward_files = ledger.files("reward")[: round_number - 1]  # rewards of the rounds before this one
        return (
            (str(reward_files[-1]),)
            if reward_files and len(load_reward(reward_files[-1]).members()) > 1
            else ()
        )

    def _annotate(
        self, round_number: int, ledger: Ledger, generator: LoadedGenerator, pairing_options: PairingOptions
    ) -> Done:
        """Label pairs by the simulated annotator, with the noise level of the first round.

        Args:
            round_number: number of the round, from 1.
            ledger: record of the finished steps.
            generator: generator whose samples are labelled.
            pairing_options: settings by which the pairs are made.
        Returns: results for the ledger, and the list of files that were written.
        """
        pairing_plan: Plan = plan(
            pairing_options,
            generator,
            ensemble=reward_ensemble(pairing_options, generator) if pairing_options.rewards else None,
        )
        seed_pairs = [(pair.first.seed, pair.second.seed) for pair in pairing_plan.pairs]
        annotation_options = AnnotationOptions(pairs=len(seed_pairs), seed=pairing_options.seed)
        # None in the first round: the annotator then calibrates its temperature, and later rounds reuse that
        # value.
        temperature = ledger.rounds[0].get("labels", {}).get("temperature")
        with tqdm(
            total=2 * len(seed_pairs), unit="seed", desc=f"round {round_number}: simulating labels"
        ) as progress_bar:
            annotation = annotate(
                generator.generator,
                annotation_options,
                lambda _: (
                    progress_bar.update() and None
                ),  # called once per evaluated sample; has to return None
                pairs=seed_pairs,
                temperature=temperature,
            )
        labels_file = write_labels(
            self.round_folder(round_number) / "labels.jsonl", annotation.preferences(generator.hash)
        )
        ledger_results = {
            "count": len(seed_pairs),
            # Share of labels that differ from the noise-free order.
            "noise": sum(not label.clean for label in annotation.labels) / len(seed_pairs),
            "temperature": annotation.temperature,
            "utility": float(annotation.utilities.mean()),
            "chosen_by_doubt": len(pairing_plan.report.get("why", ())),
            "disagreement": pairing_plan.report.get("disagreement_chosen"),
        }
        return ledger_results, [labels_file]

    def _label_by_people(
        self, round_number: int, ledger: Ledger, generator: LoadedGenerator, pairing_options: PairingOptions
    ) -> Done | None:
        """Let people label pairs.

        The first call for a round creates a labelling project, prints the command that opens it for people,
        and returns None. A later call reads their answers.

        Raises: ValueError naming --resume if answers are missing, or are too few to train a reward.
        """
        launch = people()
        project_name = f"round-{round_number}"
        # The database of the labelling project is a file in the run's folder.
        database_url = f"sqlite:///{(self.folder / 'labels.db').resolve()}"
        # True if the project was created now, so that it has no answers yet.
        if launch.make_round(database_url, project_name, generator.path, pairing_options):
            print(
                f"Round {round_number} waits for people. Label with:"
                f" {launch.label_command(database_url, project_name)}"
            )
            print(f"Then continue with: python train.py --resume={self.folder}", flush=True)
            return None
        with prefix_errors("--resume"):
            labels = launch.round_labels(database_url, project_name, generator, pairing_options.pairs)
            # Raises an error if the answers are too few for the splits of a reward, before they are recorded.
            split_by_seed([*self._recorded_labels(ledger), *labels])
        labels_file = write_labels(self.round_folder(round_number) / "labels.jsonl", labels)
        tie_count = sum(label.tie for label in labels)  # pairs that people called equal
        doubtful_count = (
            round(pairing_options.pairs * pairing_options.doubtful) if pairing_options.rewards else 0
        )
        # The noise of people's labels is unknown, because there is no ground truth.
        ledger_results = {
            "count": len(labels),
            "ties": tie_count,
            "noise": None,
            "chosen_by_doubt": doubtful_count,
        }
        return ledger_results, [labels_file]

    @staticmethod
    def _recorded_labels(ledger: Ledger) -> list[Preference]:
        """Return the labels of all rounds in the ledger, in the order of the rounds."""
        labels: list[Preference] = []
        for path in ledger.files("labels"):
            # Each round has selected its labels by their origin already.
            labels += load_labels(path, EVERYTHING)
        return labels

    # Rewards.

    def reward(self, round_number: int, ledger: Ledger) -> Done | None:
        """Train the ensemble of rewards of a round, on the labels of all rounds so far."""
        labels = self._recorded_labels(ledger)
        pooled_path = write_labels(self.round_folder(round_number) / "pooled.jsonl", labels)
        run_folder = self.round_folder(round_number) / "reward"
        config = self.s.rounds
        reward_kind = self.s.reward.reward
        # Labels refer to the generator of their samples by its hash, so the training needs all generators.
        first_network, *later_networks = self.networks(round_number, ledger)
        reward_settings = RewardRun(
            network=first_network,
            more_networks=tuple(later_networks),
            labels=LabelSource.from_file(pooled_path, EVERYTHING),
            observation=reward_kind,
            members=config.round_members,
            aggregate=config.round_aggregate,
            train=with_changes(default_options(config.round_preset, reward_kind), seed=self.s.loop.seed),
        )
        print(
            f"Round {round_number}: training {reward_settings.members} rewards on {len(labels)} labels.",
            flush=True,
        )
        # A training that has begun wrote the file of its options; it is then resumed.
        begin_or_resume = TRAINING.resume if (run_folder / OPTIONS).is_file() else TRAINING.begin
        try:
            begin_or_resume(reward_settings, run_folder, Flags({"device": self.device.type}))
        except StoppedError as stopped:
            print(f"{str(stopped).capitalize()}. Continue with --resume={self.folder}", flush=True)
            return None
        training_report = json.loads((run_folder / REPORT).read_text())
        # Accuracy on the test split against the noise-free order, which only simulated labels have, or else
        # against the labels themselves.
        noise_free_test = training_report["test"].get("clean")
        label_test = training_report["test"]["labels"]
        ledger_results = {
            "pooled": len(labels),
            "labels": training_report["labels_sha256"],
            "splits": training_report["splits"],
            "members": reward_settings.members,
            "test_accuracy": (noise_free_test or label_test)["accuracy"],
            "test_against": "noise-free order" if noise_free_test else "labels",
        }
        return ledger_results, [run_folder / "reward.safetensors", run_folder / "reward.json", pooled_path]

    # Tuning.

    def tuned(self, round_number: int, ledger: Ledger) -> Done | None:
        """Tune a generator by the rewards of the round.

        The tuning starts from the pretrained network, or with round_start=last from the network of the round
        before. The reference is the pretrained network in both cases.
        """
        tuning_folder = self.round_folder(round_number) / "tuning"
        tuning_settings = self.settings(round_number, ledger)
        print(f"Round {round_number}: tuning.", flush=True)
        # Begins the tuning, or resumes the tuning that the folder contains.
        self.tune(tuning_settings, tuning_folder)
        stats_file = tuning_folder / STATS
        stats_lines = stats_file.read_text().splitlines() if stats_file.is_file() else []
        ticks = [version_0_1.gan_stats(json.loads(stats_line)) for stats_line in stats_lines]
        # The tuning is incomplete: a signal ended it before its last tick.
        if not ticks or ticks[-1]["nimg"] < round(tuning_settings.loop.kimg * 1000):
            print(f"Continue with --resume={self.folder}", flush=True)
            return None
        network_file = find_network(tuning_folder)
        # The last network, or the network that an early stop kept.
        tuned_generator = load_generator(network_file, self.device, self.s.reward.level)
        untuned_generator = load_generator(self.pretrained_path, self.device, self.s.reward.level)
        # The ledger records the metrics of the tick at which the network was saved. With an early stop this
        # need not be the last tick.
        saved_tick = next(
            (saved_tick for saved_tick in ticks if saved_tick["nimg"] == tuned_generator.nets.cur_nimg),
            ticks[-1],
        )
        change_by_metric = {
            metric.removeprefix(PREFIX): metric_stats["mean"]
            for metric, metric_stats in saved_tick.items()
            if metric.startswith(PREFIX)
        }
        # The ledger has an entry of its own for the distance. It is measured below, because only runs with an
        # early stop log the distance at every tick.
        change_by_metric.pop("distance", None)
        distances = consistency(
            tuned_generator.G, untuned_generator.G, tuning_settings.reward.terms.consistency_resolution
        )
        ledger_results = {
            "generator": tuned_generator.hash,
            "images": tuned_generator.nets.cur_nimg,
            "distance": float(distances.mean()),
            "monitored": change_by_metric,
            "start": self.s.rounds.round_start,
        }
        return ledger_results, [network_file]

    def settings(self, round_number: int, ledger: Ledger) -> Settings:
        """Return the settings of a round's tuning: those of the run, with the rewards of the round.

        Only the last round writes a summary.
        """
        run_settings = self.s
        start_settings = {}
        # The first round has no tuned network yet, so it starts from the pretrained network in any case.
        if run_settings.rounds.round_start == LAST and round_number > 1:
            last_network_path = ledger.files("tuned")[
                round_number - 2
            ]  # the list starts with round 1, at index 0
            start_settings = {"init": str(last_network_path), "reference": str(self.pretrained_path)}
        tuning_settings = run_settings.changed(
            reward_ckpt=str(ledger.files("reward")[round_number - 1]),
            # The run's summary is made from that of its last round only.
            no_summary=run_settings.run.no_summary or round_number < run_settings.rounds.rounds,
            **start_settings,
        )
        # The tuning itself is a run without rounds.
        return dataclasses.replace(tuning_settings, rounds=RoundConfig())


def work(settings: Settings, run: Run, tune: Tune) -> None:
    """Run the rounds that are not finished. If all are finished, write the summary and print the table.

    Args:
        settings: settings of the run.
        run: the run, with its folder.
        tune: function that tunes a generator in a folder, or resumes the tuning that this folder contains.
    """
    print(f"{settings.rounds.rounds} rounds of {settings.rounds.round_pairs} pairs.", flush=True)
    ledger = Ledger(run.folder)
    if run_rounds(settings.rounds.rounds, ledger, Rounds(settings, run.folder, tune)):
        # The summary of the run is the summary of its last round and the ledger of all rounds. The last round
        # has no summary with --no-summary.
        last_tuning = run.folder / f"round-{settings.rounds.rounds}" / "tuning"
        summary_file = last_tuning / SUMMARY
        summary = version_0_1.summary(json.loads(summary_file.read_text())) if summary_file.is_file() else {}
        run.write(SUMMARY, {**summary, "rounds": ledger.rounds, "seconds": time.time() - run.began})
        print("\n" + "\n".join(table(ledger)))
        print(
            f"\nThe files {LEDGER} and {SUMMARY} were written to {run.folder}. For reports on the last round,"
            f" pass --run={last_tuning}.",
            flush=True,
        )
