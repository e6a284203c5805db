"""Controlled study of the bundled heads: labels against all cheaper arms, with several training seeds.

It tests if tuning by labels reduces the errors of heads more than arms without useful labels do. Run it with
`make controlled-study`.
Labels -> rewards -> tunings -> shapes of held-out latents -> controlled-study.json -> .md, .png.
The primary endpoints were pre-registered on 24 November 2026, before any run: docs/lab-book/2026-11-heads.md.
Letters: S training seeds, N latents, Q features; n grid points.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.core.registry import load_plugins
from eg3d_rlhf.core.seeds import LATENTS, VALIDATION, HeldOut
from eg3d_rlhf.core.statistics import t_mean_interval, two_way_interval
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.filters import FILTERS, best_filter, tried
from eg3d_rlhf.evaluation.settings import ARMS, INVERTED, LABELS, POST_PROCESSING, RANDOMISED
from eg3d_rlhf.evaluation.trainings import DOOR, TRAIN_REWARD, Part, make_shown
from eg3d_rlhf.experiments import style, version_0_1
from eg3d_rlhf.experiments.pool import run_tasks
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.experiments.table import figure_table, write
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.measures.shape_features import DEFAULT_ASSET, ShapeFeatures
from eg3d_rlhf.preferences.labels import Preference, load_labels, write_labels
from eg3d_rlhf.rewards.reward import Reward, load_reward
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from eg3d_rlhf.rewards.smoothness import AsSeen, Smoothness
from training.progress import tqdm

BY_LABELS = (LABELS, RANDOMISED, INVERTED)  # these train a reward for each label set and each reward seed
PRIMARY_ENDPOINTS = ("error_defective", "shape_frechet")  # lower is better; pre-registered
HARM = 0.02  # share of intact heads that an arm may degrade and still count as harmless
PSIS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # candidates of the truncation arm
CHOOSING = 64  # validation latents on which the post-processing method is chosen
FIRST_SEED = 40_000  # latents of further label sets begin here
TUNED = ("--reward=sigma",)  # flags of train.py; all others are those of the demo


# Rewards of the arms.


def randomised(labels: Sequence[Preference], seed: int) -> list[Preference]:
    """Return the same pairs, each with a random winner."""
    # the constant 5 separates this random stream from others of the same seed
    heads_up = np.random.default_rng([seed, 5]).random(len(labels)) < 0.5
    return [inverted(label) if up else label for label, up in zip(labels, heads_up, strict=True)]


def inverted(label: Preference) -> Preference:
    """Return the label with winner and loser exchanged."""
    return replace(label, winner=label.loser, loser=label.winner)


def permuted(reward: Reward, seed: int) -> Reward:
    """Return the reward with the entries of each tensor of its network in a random order.

    The control keeps the distribution of the weights and removes what they have learnt. It changes `reward`
    in place.
    """
    random = torch.Generator().manual_seed(seed)
    state = reward.network.state_dict()  # shares memory with the network
    for values in state.values():
        values.copy_(values.flatten()[torch.randperm(values.numel(), generator=random)].view_as(values))
    return Reward(reward.observation, reward.network, {**reward.provenance, "permuted": seed})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All arms, seeds and label sets of a study, and the parts that make them."""

    out: Path  # folder of the study
    arms: Sequence[str]  # names in ARMS
    seeds: Sequence[int]  # training seeds of tuning
    rewards: int  # number of training seeds of rewards, for each label set
    draws: int  # number of label sets
    latents: int  # number of held-out latents that are measured
    network: Path | None  # None: the bundled generator
    labels: Path  # the first label set
    train: tuple[str, ...]  # further flags of tools/train_reward.py
    tune: tuple[str, ...]  # further flags of train.py

    def draw(self, number: int) -> Path:
        """Return the file of a label set."""
        return self.labels if number == 0 else self.out / "labels" / f"draw{number}" / "labels.jsonl"

    def labels_of(self, arm: str, number: int) -> Path:
        """Return the file of an arm's labels: the label set, or its randomised or inverted copy."""
        return (
            self.draw(number)
            if arm == LABELS
            else self.out / "labels" / f"{self.in_paths(arm)}{number}.jsonl"
        )

    def in_paths(self, arm: str) -> str:
        """Return the name of an arm in file names."""
        # folders that version 0.1 began keep its names
        return version_0_1.arm_in_paths(self.out, arm)

    def label_parts(self) -> list[Part]:
        """List the parts that label further sets of pairs."""
        # as many pairs as the first set has
        count = len(load_labels(self.labels)) if self.draws > 1 else 0
        more = [f"--network={self.network}"] if self.network else []
        return [
            Part(
                f"labels, draw {d}",
                self.draw(d).parent,
                DOOR,
                (
                    "label",
                    "synthetic",
                    f"--pairs={count}",
                    f"--seed={d}",
                    # each set begins 20,000 latents after the one before, so that they share no latent
                    f"--first-seed={FIRST_SEED + 20_000 * d}",
                    *more,
                    f"--out={self.draw(d)}",
                ),
            )
            for d in range(1, self.draws)
        ]

    def bundled(self, arm: str, draw: int, seed: int) -> bool:
        """Return True for the reward that equals the bundled one, so that it need not be trained."""
        return (arm, draw, seed) == (LABELS, 0, 0) and self.labels == BUNDLED_LABELS and not self.train

    def reward_part(self, arm: str, draw: int, seed: int) -> Part:
        """Return the part that trains a reward on an arm's labels."""
        more = [f"--network={self.network}"] if self.network else []
        flags = [
            f"--labels={self.labels_of(arm, draw)}",
            f"--seed={seed}",
            f"--set=split_seed={seed}",  # another seed also has other training, validation and test pairs
            *more,
            *self.train,
        ]
        folder = self.out / "rewards" / f"{self.in_paths(arm)}-d{draw}-r{seed}"
        return Part(
            f"reward: {arm}, draw {draw}, seed {seed}", folder, TRAIN_REWARD, (*flags, f"--run-dir={folder}")
        )

    def reward_parts(self) -> list[Part]:
        """List the trainings of all rewards, except the bundled one."""
        arms = [arm for arm in BY_LABELS if arm in self.arms]
        return [
            self.reward_part(arm, d, r)
            for arm in arms
            for d in range(self.draws)
            for r in range(self.rewards)
            if not self.bundled(arm, d, r)
        ]

    def reward(self, arm: str, draw: int = 0, seed: int = 0) -> Path:
        """Return the file of the reward of an arm, which `reward_parts` or `write_rewards` makes."""
        if arm in BY_LABELS:
            return (
                bundled.REWARD
                if self.bundled(arm, draw, seed)
                else self.reward_part(arm, draw, seed).folder / "reward.safetensors"
            )
        # smoothness has no weights that depend on a seed
        return self.out / "rewards" / f"{arm}{seed if arm == 'permuted' else ''}.safetensors"

    def tunings(self) -> dict[tuple[str, int, int, int], Part]:
        """Return the tunings by (arm, training seed, label set, reward seed)."""
        parts = {}
        for arm in self.arms:
            for case in self._cases(arm):
                seed, d, r = case
                # with λ_r = 0 the reward does not change the weights, so any reward will do
                source = self.reward(LABELS) if arm == "no-reward" else self.reward(arm, d, r)
                flags = [
                    "--reward=smoothness" if arm == "smoothness" else TUNED[0],
                    f"--reward-ckpt={source}",
                ]
                flags += ["--lambda-r=0"] if arm == "no-reward" else []
                flags += [f"--init={self.network}"] if self.network else []
                parts[arm, *case] = Part.keyed(
                    f"{self.in_paths(arm)}-s{seed}-d{d}-r{r}",
                    self.out / "runs",
                    [*flags, f"--seed={seed}", "--no-summary", *self.tune],
                )
        return parts

    def _cases(self, arm: str) -> Iterator[tuple[int, int, int]]:
        """Yield the (training seed, label set, reward seed) of an arm's tunings."""
        # these two change the untuned network's shapes or latents, and tune nothing
        if arm in (POST_PROCESSING, "truncation"):
            return
        draws = self.draws if arm in BY_LABELS else 1
        rewards = self.rewards if arm in (*BY_LABELS, "permuted") else 1
        yield from ((seed, d, r) for seed in self.seeds for d in range(draws) for r in range(rewards))


def write_labels_of_arms(plan: Plan) -> None:
    """Write the randomised and the inverted copy of every label set."""
    for d in range(plan.draws):
        labels = load_labels(plan.draw(d))
        for arm, made in (
            (RANDOMISED, randomised(labels, d)),
            (INVERTED, [inverted(label) for label in labels]),
        ):
            if arm in plan.arms:
                plan.labels_of(arm, d).parent.mkdir(parents=True, exist_ok=True)
                write_labels(plan.labels_of(arm, d), made)


def write_rewards(plan: Plan) -> None:
    """Write the rewards that need no training: smoothness, and the label reward with permuted weights."""
    if "smoothness" in plan.arms:
        Reward(Smoothness.of(load_generator(plan.network).generator), AsSeen()).save(
            plan.reward("smoothness")
        )
    for seed in range(plan.rewards if "permuted" in plan.arms else 0):
        permuted(load_reward(plan.reward(LABELS, 0, seed)), seed).save(plan.reward("permuted", 0, seed))


# Measurements of each arm's shapes.


GROUND_TRUTH = "ground-truth heads"  # tasks; every tuning is a task under its own name
BEFORE = "before"
METHOD = "filter"  # array with the number of the chosen method; the name that version 0.1 wrote


def _task_of_psi(psi: float) -> str:
    """Return the name of the task that measures the untuned network at a truncation."""
    return f"psi {psi:g}"


def _looker(
    folder: Path,
    inputs: Mapping[str, Mapping],
    network: Path | None,
    tuned: Mapping[str, Path],
    latents: int,
    held: HeldOut = LATENTS,
) -> Callable[[str], None]:
    """Set up a worker process; return the function that measures a task's shapes and stores the result.

    Args: folder: of the store; inputs: of each task; tuned: network by task; latents: number of latents.
    """
    store = Store(folder, renew=True)
    torch.set_num_threads(1)  # one process per core; more threads would compete
    load_plugins()
    before = load_generator(network).generator
    seeds = held.take(latents)
    targets = heads.ground_truth(before, seeds)  # [N, n, n, n]
    features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None

    def seen(shapes: np.ndarray) -> dict:
        return heads.looked_at(shapes, targets) | (
            {"features": features.of_grids(shapes)} if features else {}
        )

    def work(task: str) -> dict:
        if task == GROUND_TRUTH:
            return {"features": features.of_grids(targets) if features else np.zeros((0, 0))}
        if task == POST_PROCESSING:
            # the method is chosen on validation latents, so that the measured ones do not select it
            validation = VALIDATION.take(min(CHOOSING, max(latents, 1)))
            name = best_filter(
                tried(heads.scans(before, validation), heads.ground_truth(before, validation)), spares=True
            )
            made = np.stack([FILTERS[name](values) for values in heads.scans(before, seeds)])
            return {**seen(made), METHOD: np.array([list(FILTERS).index(name)])}
        if task.startswith("psi "):
            return seen(heads.scans(before, seeds, float(task.removeprefix("psi "))))
        return seen(heads.scans(before if task == BEFORE else load_generator(tuned[task]).generator, seeds))

    def keep(task: str) -> None:
        store.arrays("shapes", inputs[task], lambda: work(task))

    return keep


def look(plan: Plan, tuned: Mapping[str, Path], jobs: int) -> dict[str, dict]:
    """Measure the ground-truth heads, the heads before tuning, and those of every arm.

    Args: tuned: network file of each tuning, by task; jobs: number of processes.
    Returns: measurements by task, which are also kept in <out>/seen.
    """
    tasks = [GROUND_TRUTH, BEFORE, *tuned]
    tasks += [POST_PROCESSING] if POST_PROCESSING in plan.arms else []
    tasks += [_task_of_psi(psi) for psi in PSIS] if "truncation" in plan.arms else []
    shared = {
        "generator": file_hash(plan.network or bundled.GENERATOR),
        "features": file_hash(DEFAULT_ASSET) if DEFAULT_ASSET.is_file() else "",
        "latents": plan.latents,
    }
    # the tasks' names of version 0.1 stay in the hash, so that its results are found
    inputs = {
        task: {"seen": file_hash(tuned[task]) if task in tuned else version_0_1.former(task), **shared}
        for task in tasks
    }
    store = Store(plan.out / "seen", renew=True)
    missing = [task for task in tasks if store.find("shapes", inputs[task]) is None]
    # the ground-truth heads come first: computing them writes them to the disk, where the others find them
    needs = {
        task: [GROUND_TRUTH] if GROUND_TRUTH in missing and task != GROUND_TRUTH else [] for task in missing
    }
    words = "shapes of held-out latents"
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc=words, unit="arm") as bar:
        if missing:
            run_tasks(
                needs,
                _looker,
                (store.root, inputs, plan.network, dict(tuned), plan.latents),
                min(jobs, len(missing)),
                plan.out / "logs",
                lambda *_: bar.update() and None,
            )
    return {task: store.load_arrays("shapes", inputs[task]) for task in tasks}


# The table, from the measurements.


def row(seen: Mapping, before: Mapping, reference: np.ndarray | None) -> dict:
    """Compute the figures of one network. Args: reference: features [N, Q] of ground-truth heads, or None."""
    values = heads.figures(before, seen)
    # a network's interval covers latents alone; `arm` computes the one over seeds and latents
    del values["error_reduction_ci95"]
    return values | (
        {} if reference is None else {"shape_frechet": heads.shape_frechet(seen["features"], reference)}
    )


def arm(rows: Mapping[int, Sequence[dict]], errors: np.ndarray, before: Mapping) -> dict:
    """Combine an arm's figures: each is a list by training seed of means over the arm's rewards.

    Args: rows: figures of each reward, by training seed; errors: back-of-head volume errors [S, N].
    """
    names = list(next(iter(rows.values()))[0])
    by_seed = {}
    for name in names:
        by_seed[name] = [_mean([figures[name] for figures in each]) for each in rows.values()]
    return {
        **by_seed,
        "error_reduction_ci95": heads.interval(before, errors),
        "runs": {str(seed): list(each) for seed, each in rows.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def truncated(seen: Mapping[float, Mapping], share: float) -> float:
    """Return the largest psi at which at least `share` of the heads is intact.

    If no psi reaches it, return the psi with the largest share. The truncation arm thus leaves as many intact
    heads as the labels arm, with as little truncation as possible.
    """
    shares = {}
    for psi, shapes in seen.items():
        shares[psi] = float((heads.error(shapes) <= heads.DEFECTIVE).mean())
    enough = [psi for psi, reached in shares.items() if reached >= share]
    return max(enough) if enough else max(shares, key=lambda psi: (shares[psi], psi))


def criterion(arms: Mapping[str, Mapping], primary_endpoints: Sequence[str]) -> dict:
    """Evaluate the pre-registered criterion.

    It holds if labels are lower than every other arm in each primary endpoint with every training seed, and
    degrade no more intact heads. A share of degraded heads up to HARM counts as none.
    """
    against = {}
    ours = arms[LABELS]
    for name, theirs in arms.items():
        if name == LABELS:
            continue
        lower = {
            endpoint: [a < b for a, b in zip(ours[endpoint], theirs[endpoint], strict=True)]
            for endpoint in primary_endpoints
        }
        pairs = zip(ours["intact_degraded"], theirs["intact_degraded"], strict=True)
        # None: no head was intact before, so none can be degraded
        harmless = [mine is None or mine <= max(HARM, other or 0.0) for mine, other in pairs]
        against[name] = {
            "lower": lower,
            "no_more_harm": harmless,
            "beaten": all(map(all, lower.values())) and all(harmless),
        }
    return {
        # without another arm nothing was beaten
        "labels_win": bool(against) and all(result["beaten"] for result in against.values()),
        "against": against,
    }


def compare(plan: Plan, seen: Mapping[str, Mapping], names: Mapping[tuple[str, int, int, int], str]) -> dict:
    """Compute the content of controlled-study.json.

    Args: seen: measurements by task; names: the task of each tuning.
    """
    before = seen[BEFORE]
    # the features' network may not be installed; then the shape Fréchet distance is left out
    reference = seen[GROUND_TRUTH]["features"] if len(seen[GROUND_TRUTH]["features"]) else None
    primary_endpoints = [
        name for name in PRIMARY_ENDPOINTS if name != "shape_frechet" or reference is not None
    ]
    shares = {}
    arms: dict[str, dict] = {}
    errors: dict[str, np.ndarray] = {}
    for name in plan.arms:
        # training seed: tasks of its rewards
        cases = {seed: [names[case] for case in names if case[:2] == (name, seed)] for seed in plan.seeds}
        if name == POST_PROCESSING:
            # it has no training, so every seed has the same result
            cases = {seed: [POST_PROCESSING] for seed in plan.seeds}
        if name == "truncation":
            # as many intact heads as the labels arm has with the same seed; LABELS stands first in ARMS
            tried = {psi: seen[_task_of_psi(psi)] for psi in PSIS}
            shares = {
                seed: truncated(tried, _mean(arms[LABELS]["intact_share"][i : i + 1]) or 0.0)
                for i, seed in enumerate(plan.seeds)
            }
            cases = {seed: [_task_of_psi(psi)] for seed, psi in shares.items()}
        rows = {seed: [row(seen[task], before, reference) for task in tasks] for seed, tasks in cases.items()}
        # [S, N], averaged over rewards
        errors[name] = np.stack(
            [np.mean([heads.error(seen[task]) for task in tasks], axis=0) for tasks in cases.values()]
        )
        arms[name] = arm(rows, errors[name], before)
    untuned = row(before, before, reference)
    for name in arms:
        # the arm's gain over the untuned network, relative to the gain of the labels
        gains = zip(arms[name]["error_defective"], arms[LABELS]["error_defective"], strict=True)
        arms[name]["share_of_gain"] = [_share(untuned["error_defective"], a, b) for a, b in gains]
        if name != LABELS:
            arms[name]["error_over_labels"] = _over(errors[name] - errors[LABELS], heads.defective(before))
    return {
        "primary_endpoints": primary_endpoints,
        "pre_registered": "2026-11-24",
        "seeds": list(plan.seeds),
        "rewards": plan.rewards,  # for each label set
        "label_sets": plan.draws,
        "latents": plan.latents,
        "defective": int(heads.defective(before).sum()),  # latents, before tuning
        "before": untuned,
        "arms": arms,
        "post_processing": list(FILTERS)[int(seen[POST_PROCESSING][METHOD][0])]
        if POST_PROCESSING in seen
        else None,
        "psi": {str(seed): psi for seed, psi in shares.items()},  # of the truncation arm; JSON keys are text
        "criterion": criterion(arms, primary_endpoints),
        "harm_allowed": HARM,  # part of the criterion
        "flags": {"tune": [*TUNED, *plan.tune], "train": list(plan.train)},
    }


def _share(before: float | None, after: float | None, best: float | None) -> float | None:
    """Return (before - after) / (before - best); None where that is not defined."""
    if before is None or after is None or best is None or before == best:
        return None
    return (before - after) / (before - best)


def _over(difference: np.ndarray, is_defective: np.ndarray) -> dict | None:
    """Return the mean of differences [S, N] over seeds and defective heads, with two intervals.

    One interval covers seeds and heads, the other seeds alone.
    """
    here = difference[:, is_defective]  # [S, defective]
    if not here.size:
        return None
    interval = two_way_interval(lambda seeds, items: here[np.ix_(seeds, items)].mean(), *here.shape)
    over_seeds = t_mean_interval(here.mean(axis=1)) if len(here) > 1 else None
    return {
        "mean": float(here.mean()),
        "ci95": [interval.lo, interval.hi],
        "ci95_over_seeds": over_seeds and [over_seeds.lo, over_seeds.hi],
    }


FIGURES = {  # of the table: (words, format)
    "error_defective": ("back-of-head volume error", ".3f"),
    "shape_frechet": ("shape Fréchet", ".2f"),
    "error_reduction": ("error reduction", ".0%"),
    "intact_degraded": ("intact degraded", ".0%"),
    "intact_share": ("intact after", ".0%"),
    "fscore_defective": ("F-score", ".3f"),
    "missing_defective": ("missing", ".3f"),
    "extra_defective": ("extra", ".3f"),
    "variety": ("variety", ".3f"),
    "identity_kept": ("identity", ".0%"),
    "face_moved_voxels": ("face moved", ".2f"),
    "changed": ("changed", ".3f"),
}


def markdown(data: Mapping) -> str:
    """Format the table, the result of the criterion, and the text that describes how the table was made."""
    columns = {
        name: (words + (" (primary)" if name in data["primary_endpoints"] else ""), form)
        for name, (words, form) in FIGURES.items()
        if name in data["before"]
    }
    arms = {"before tuning": data["before"]}
    for name, figures in data["arms"].items():
        psi = ", ".join(f"{psi:g}" for psi in sorted(set(data["psi"].values())))
        more = {"truncation": f" (ψ {psi})", POST_PROCESSING: f" ({data['post_processing']})"}
        arms[ARMS[name] + more.get(name, "")] = figures
    table = figure_table("arm", arms, columns)
    result = data["criterion"]
    unbeaten = [ARMS[name] for name, against in result["against"].items() if not against["beaten"]]
    sentences = (
        "The pre-registered criterion is met: labels beat every other arm in each primary endpoint with every"
        " training seed, and degrade no more intact heads."
        if result["labels_win"]
        else (
            "The pre-registered criterion is not met. Labels do not beat these arms in each primary endpoint"
            " with every training seed, or they degrade more intact heads:"
            f" {', '.join(unbeaten) or 'there was no other arm'}."
        )
    )
    text = (
        f"{data['latents']} held-out latents, ψ 1, {data['defective']} of them defective before tuning;"
        f" training seeds {', '.join(map(str, data['seeds']))}, {data['rewards']} reward(s) for each of"
        f" {data['label_sets']} set(s) of labels. Figures are means over training seeds; brackets hold the"
        " least and the greatest. Volume error, missing and extra are shares of the ground-truth head's"
        " back-of-head volume, of defective heads. The F-score is measured at the back at one voxel, of"
        f" defective heads. An intact head is degraded if its volume error grows by more than {heads.WORSE}."
        " Lengths are in voxels of 64³. Changed: share of the back-of-head volume that became solid or empty."
    )
    return "\n".join(["# Controlled study of the bundled heads", "", sentences, "", *table, "", text, ""])


def plot(data: Mapping):
    """Plot each primary endpoint of every arm, one point for each training seed."""
    names = list(data["arms"])
    figure, axes = style.figure(columns=len(data["primary_endpoints"]), size=(9.4, 1.4 + 0.3 * len(names)))
    # with a single endpoint `axes` is no array
    for axis, primary in zip(np.atleast_1d(axes), data["primary_endpoints"], strict=True):
        for place, name in enumerate(names):
            values = data["arms"][name][primary]
            axis.plot(
                values,
                [place] * len(values),
                "o",
                markersize=4,
                color=style.colour("after" if name == LABELS else "control"),
            )
        axis.axvline(data["before"][primary], color=style.colour("before"), linewidth=1)
        axis.set_yticks(range(len(names)), [ARMS[name] for name in names], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"{FIGURES[primary][0]}, lower is better; line: before", fontsize=8)
    return figure


def commands(plan: Plan) -> dict[str, list[str]]:
    """Return the command of every part, by its name."""
    parts = [*plan.label_parts(), *plan.reward_parts(), *plan.tunings().values()]
    return {part.name: part.command() for part in parts}


def work(plan: Plan, jobs: int) -> list[Path]:
    """Make what is missing, measure it, and write controlled-study.json, .md and .png; return their paths."""
    # the cores are divided among the processes that run at the same time
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for write_more, parts, words in (
        (write_labels_of_arms, plan.label_parts(), "sets of labels"),
        (write_rewards, plan.reward_parts(), "rewards trained"),
    ):
        make_shown([[part] for part in parts], jobs, threads, words)
        write_more(plan)
    tunings = plan.tunings()
    make_shown([[part] for part in tunings.values()], jobs, threads, "networks tuned")
    networks = {part.name: path for part in tunings.values() if (path := part.network()) is not None}
    data = compare(plan, look(plan, networks, jobs), {case: part.name for case, part in tunings.items()})
    return write(data, plan.out, "controlled-study", markdown, plot)
