"""Preference rounds composed: who labels, how rewards are trained and the generator tuned; `eg3d_rlhf.tuning.gan.rounds` knows the order.

    round-1/labels.jsonl    the round's own labels
    round-1/pooled.jsonl    with those of all rounds before
    round-1/reward/         the rewards' training, as tools/train_reward.py leaves it
    round-1/tuning/         the generator's, as train.py leaves it
    ledger.json             what was done, with hashes
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eg3d_rlhf.core.cli import choose_device, naming
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import OPTIONS, STATS, Run, claim, next_free, recorded
from eg3d_rlhf.generators import LoadedGenerator, find_network, load_generator
from eg3d_rlhf.modes import gan as experiment
from eg3d_rlhf.people.label.pairing import PairingOptions, Plan, plan, reward_ensemble
from eg3d_rlhf.preferences.dataset import split_by_seed
from eg3d_rlhf.preferences.labels import MAX_SEED, LabelSource, Preference, load_labels, write_labels
from eg3d_rlhf.preferences.synthetic import AnnotationOptions, annotate
from eg3d_rlhf.rewards.reward import check_reward, load_reward
from eg3d_rlhf.rewards.run import Listener, RewardRun, run_reward_training
from eg3d_rlhf.rewards.train import default_options, with_changes
from eg3d_rlhf.tuning.gan.early_stop import consistency
from eg3d_rlhf.tuning.gan.rounds import LAST, LEDGER, PEOPLE, Ledger, RoundConfig, run_rounds, table
from eg3d_rlhf.tuning.gan.settings import Settings, input_files
from eg3d_rlhf.tuning.gan.watch import annotator_calibration
from training import checkpoint
from training.distributed import SINGLE, Ranks
from training.gan import check_fit
from training.phases import derive_seed
from training.progress import tqdm

PSI = 1.0  # truncation of the shapes that are labelled
SUMMARY = "summary.json"
Done = tuple[dict, list[Path]]


def begun(source: Path | None) -> bool:
    """Whether --resume names a run of rounds."""
    return source is not None and source.is_dir() and bool(recorded(source).get("rounds"))


def start(s: Settings, outdir: Path, ranks: Ranks = SINGLE) -> Path:
    """A new run in `outdir`; returns its folder. Whatever is wrong comes to light before there is one."""
    if ranks.world > 1:
        raise ValueError(f"--rounds: expected one process, got {ranks.world}. Start without torchrun.")
    check(s)
    folder = claim(next_free(outdir, s.name))
    with Run(folder, s.to_dict(), input_files(s)) as files:
        files.begin()
        print(f"Run folder {folder}. {s.rounds.rounds} rounds of {s.rounds.round_pairs} pairs.", flush=True)
        return _go_on(s, files)


def resume(folder: Path, previous: bool, ranks: Ranks = SINGLE, workers: int | None = None) -> Path:
    """Go on with a run where it was. Raises: ValueError where its inputs, its ledger or a file that this names are not as they were."""
    if ranks.world > 1:
        raise ValueError(f"--rounds: expected one process, got {ranks.world}. Start without torchrun.")
    s = Settings.recorded(recorded(folder))
    s = s if workers is None else s.changed(workers=workers)
    with Run(folder, s.to_dict(), input_files(s)) as files:
        files.resume(free=None)  # they are the recorded ones
        return _go_on(s, files, previous)


def check(s: Settings) -> None:
    """Raise ValueError for what would stop a round later: data, networks, rewards and seeds that do not fit."""
    config, kind = s.rounds, s.reward.reward
    with naming("--round-pairs"):
        for number in range(1, config.rounds + 1):
            pairing(s, number, doubt=True)
        split_by_seed([Preference(winner=2 * i, loser=2 * i + 1) for i in range(config.round_pairs)])
    with naming("--round-preset"):
        default_options(config.round_preset, kind)
    with naming("--round-aggregate"):
        RewardRun(out=Path(), members=config.round_members, aggregate=config.round_aggregate)
    if config.round_labels == PEOPLE:
        people()
    nets = experiment.open_networks(s, experiment.open_dataset(s).resolution, warm_start=False)
    check_fit(nets, s.gan, s.loop, 1)
    if s.reward.reward_watch is not None:
        with naming("--reward-watch"):
            check_reward(load_reward(s.reward.reward_watch), load_generator(pretrained(s)).generator)


def pretrained(s: Settings) -> Path:
    """File of the network that everything starts from."""
    return find_network(None if s.net.init == "bundled" else s.net.init)


def people():
    """What campaigns need. Raises: ValueError where the labelling application's packages are missing."""
    try:
        from eg3d_rlhf.people.label import launch
    except ImportError as error:
        raise ValueError(f"--round-labels=people: expected the labelling tool, got: {error}. pip install eg3d-rlhf[label].") from None
    return launch


def pairing(s: Settings, number: int, doubt: bool, rewards: tuple[str, ...] = ()) -> PairingOptions:
    """Which pairs a round draws; every round has seeds of its own. Args: doubt: whether rewards choose a share of them."""
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
    """The steps of `eg3d_rlhf.tuning.gan.rounds.Work`, in the folder of a run."""

    def __init__(self, s: Settings, folder: Path, previous: bool = False):
        self.s, self.folder, self.previous = s, folder, previous
        self.device, self.first = choose_device(s.run.device), pretrained(s)

    def of(self, number: int) -> Path:
        """Folder of a round."""
        return self.folder / f"round-{number}"

    def networks(self, number: int, ledger: Ledger) -> list[Path]:
        """The generators that rounds up to `number` have labelled, this round's last."""
        return [self.first, *ledger.files("tuned")][:number]

    # Labels.

    def labels(self, number: int, ledger: Ledger) -> Done | None:
        """Draw pairs from the current generator and have them labelled."""
        rewards = self._doubters(number, ledger)
        options = pairing(self.s, number, bool(rewards), rewards)
        generator = load_generator(self.networks(number, ledger)[-1], self.device)
        label = self._ask if self.s.rounds.round_labels == PEOPLE else self._annotate
        found = label(number, ledger, generator, options)
        return None if found is None else ({"by": self.s.rounds.round_labels, "generator": generator.hash, **found[0]}, found[1])

    def _doubters(self, number: int, ledger: Ledger) -> tuple[str, ...]:
        """File of the rewards whose disagreement chooses pairs; none in the first round, and where there is but one reward."""
        files = ledger.files("reward")[: number - 1]
        return (str(files[-1]),) if files and len(load_reward(files[-1]).members()) > 1 else ()

    def _annotate(self, number: int, ledger: Ledger, generator: LoadedGenerator, options: PairingOptions) -> Done:
        """Labels by the programmatic annotator, with the noise of the first round's."""
        planned: Plan = plan(options, generator, ensemble=reward_ensemble(options, generator) if options.rewards else None)
        pairs = [(pair.first.seed, pair.second.seed) for pair in planned.pairs]
        asked = AnnotationOptions(pairs=len(pairs), psi=options.psi, seed=options.seed)
        known = ledger.rounds[0].get("labels", {}).get("temperature")
        with tqdm(total=2 * len(pairs), unit="seed", desc=f"round {number}: judging") as bar:
            found = annotate(
                generator.generator, asked, lambda result: bar.update() and None, pairs=pairs, temperature=known,
                calibration=annotator_calibration(),
            )
        path = write_labels(self.of(number) / "labels.jsonl", found.preferences(generator.hash))
        figures = {
            "count": len(pairs), "noise": sum(not label.clean for label in found.labels) / len(pairs), "temperature": found.temperature,
            "utility": float(found.utilities.mean()), "chosen_by_doubt": len(planned.report.get("why", ())),
            "disagreement": planned.report.get("disagreement_chosen"),
        }  # fmt: skip
        return figures, [path]

    def _ask(self, number: int, ledger: Ledger, generator: LoadedGenerator, options: PairingOptions) -> Done | None:
        """Labels by people: the first call makes a campaign and says how to answer it; a later one reads what they have answered."""
        campaigns, name = people(), f"round-{number}"
        url = f"sqlite:///{(self.folder / 'labels.db').resolve()}"
        if campaigns.make_round(url, name, generator.path, options):
            print(f"Round {number} waits for people. Label with: {campaigns.label_command(url, name)}")
            print(f"Then go on with: python train.py --resume={self.folder}", flush=True)
            return None
        with naming("--resume"):
            labels = campaigns.round_labels(url, name, generator, options.pairs)
            split_by_seed([*(label for path in ledger.files("labels") for label in load_labels(path)), *labels])
        path = write_labels(self.of(number) / "labels.jsonl", labels)
        ties = sum(label.tie for label in labels)
        doubted = round(options.pairs * options.doubtful) if options.rewards else 0
        return {"count": len(labels), "ties": ties, "noise": None, "chosen_by_doubt": doubted}, [path]

    # Rewards.

    def reward(self, number: int, ledger: Ledger) -> Done | None:
        """Train the rewards from scratch on the labels of all rounds so far."""
        labels = [label for path in ledger.files("labels") for label in load_labels(path)]
        pooled, out = write_labels(self.of(number) / "pooled.jsonl", labels), self.of(number) / "reward"
        config, kind, (network, *others) = self.s.rounds, self.s.reward.reward, self.networks(number, ledger)
        run = RewardRun(
            out=out, network=network, more_networks=tuple(others), labels=LabelSource.of_file(pooled), observation=kind,
            members=config.round_members, aggregate=config.round_aggregate, resume=(out / OPTIONS).is_file(), device=str(self.device),
            train=with_changes(default_options(config.round_preset, kind), seed=self.s.loop.seed),
        )
        print(f"Round {number}: training {run.members} rewards on {len(labels)} labels.", flush=True)
        try:
            report = run_reward_training(run, Listener(bar=partial(_bar, number)))
        except StoppedError as stopped:
            print(f"{str(stopped).capitalize()}. Continue with --resume={self.folder}", flush=True)
            return None
        assert report is not None
        test, clean = report["test"]["labels"], report["test"].get("clean")
        figures = {
            "pooled": len(labels), "labels": report["labels_sha256"], "splits": report["splits"], "members": run.members,
            "test_accuracy": (clean or test)["accuracy"], "test_against": "noise-free order" if clean else "labels",
        }  # fmt: skip
        return figures, [out / "reward.safetensors", out / "reward.json", pooled]

    # Tuning.

    def tuned(self, number: int, ledger: Ledger) -> Done | None:
        """Tune with the round's rewards, from the pretrained network or the last, held to the pretrained one in either case."""
        folder, own = self.of(number) / "tuning", self.settings(number, ledger)
        print(f"Round {number}: tuning.", flush=True)
        if checkpoint.available(folder):
            experiment.resume(folder, self.previous, workers=self.s.run.workers)
        else:
            experiment.run(own, folder)
        ticks = [json.loads(line) for line in (folder / STATS).read_text().splitlines()] if (folder / STATS).is_file() else []
        if not ticks or ticks[-1]["nimg"] < round(own.loop.kimg * 1000):
            print(f"Continue with --resume={self.folder}", flush=True)
            return None
        path = find_network(folder)
        after, before = load_generator(path, self.device), load_generator(self.first, self.device)
        tick = next((tick for tick in ticks if tick["nimg"] == after.nets.cur_nimg), ticks[-1])
        watched = {name.removeprefix("Watch/"): value["mean"] for name, value in tick.items() if name.startswith("Watch/")}
        watched.pop("distance", None)  # stated apart, whether an early stop took it or not
        distance = consistency(after.G, before.G, own.reward.terms.anchor_resolution)
        figures = {
            "generator": after.hash, "images": after.nets.cur_nimg, "distance": float(distance.mean()), "watch": watched,
            "start": self.s.rounds.round_start,
        }  # fmt: skip
        return figures, [path]

    def settings(self, number: int, ledger: Ledger) -> Settings:
        """Of a round's tuning: the run's own, with the round's rewards; the last round alone is summarised."""
        s, more = self.s, {}
        if s.rounds.round_start == LAST and number > 1:
            more = {"init": str(ledger.files("tuned")[number - 2]), "reference": str(self.first)}
        no_summary = s.run.no_summary or number < s.rounds.rounds
        one = s.changed(reward_ckpt=str(ledger.files("reward")[number - 1]), no_summary=no_summary, **more)
        return dataclasses.replace(one, rounds=RoundConfig())


def _bar(number: int, total: int, what: str) -> Callable[[int], None]:
    bar = tqdm(total=total, desc=f"round {number}: {what}", dynamic_ncols=True)
    return lambda done: bar.update(done) and None


def _go_on(s: Settings, files: Run, previous: bool = False) -> Path:
    began, ledger = time.time(), Ledger(files.folder)
    if run_rounds(s.rounds.rounds, ledger, Rounds(s, files.folder, previous)):
        last = files.folder / f"round-{s.rounds.rounds}" / "tuning"
        summary = json.loads((last / SUMMARY).read_text()) if (last / SUMMARY).is_file() else {}
        files.write(SUMMARY, {**summary, "rounds": ledger.rounds, "seconds": time.time() - began})
        print("\n" + "\n".join(table(ledger)))
        print(f"\nWritten to {files.folder}: {LEDGER}, {SUMMARY}. The last round's run, for reports: {last}", flush=True)
    return files.folder
