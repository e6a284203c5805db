"""Whether labels, and nothing cheaper, repair heads of people: every arm with several training seeds, in one
table. `make controlled-study`.

Labels -> rewards -> tunings -> shapes of held-out latents -> controlled-study.json -> .md, .png. The primary
measures were fixed on 24 November 2026, before any run: docs/lab-book/2026-11-heads.md. Letters: S training
seeds, N latents, Q features; n grid points.
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

BY_LABELS = (LABELS, RANDOMISED, INVERTED)  # a reward for each draw of labels and each seed of its training
PRIMARY_ENDPOINTS = ("error_defective", "shape_frechet")  # lower is better; pre-registered
HARM = 0.02  # share of intact heads that an arm may degrade and still count as harmless
PSIS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # tried by truncation
CHOOSING = 64  # validation latents on which the post-processing method is chosen
FIRST_SEED = 40_000  # of further draws of labels
TUNED = ("--reward=sigma",)  # the demo's own settings


# Rewards of the arms.


def randomised(labels: Sequence[Preference], seed: int) -> list[Preference]:
    """Return the same pairs, each with a random winner."""
    heads_up = np.random.default_rng([seed, 5]).random(len(labels)) < 0.5
    return [inverted(label) if up else label for label, up in zip(labels, heads_up, strict=True)]


def inverted(label: Preference) -> Preference:
    return replace(label, winner=label.loser, loser=label.winner)


def permuted(reward: Reward, seed: int) -> Reward:
    """The same network with the entries of each tensor in another order, drawn by a seed."""
    random = torch.Generator().manual_seed(seed)
    state = reward.network.state_dict()
    for values in state.values():
        values.copy_(values.flatten()[torch.randperm(values.numel(), generator=random)].view_as(values))
    return Reward(reward.observation, reward.network, {**reward.provenance, "permuted": seed})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is made."""

    out: Path
    arms: Sequence[str]
    seeds: Sequence[int]  # of tuning
    rewards: int  # seeds of rewards, for each draw
    draws: int  # of labels
    latents: int
    network: Path | None  # None: the bundled generator
    labels: Path  # of the first draw
    train: tuple[str, ...]  # further flags of tools/train_reward.py
    tune: tuple[str, ...]  # and of train.py

    def draw(self, number: int) -> Path:
        return self.labels if number == 0 else self.out / "labels" / f"draw{number}" / "labels.jsonl"

    def labels_of(self, arm: str, number: int) -> Path:
        return (
            self.draw(number)
            if arm == LABELS
            else self.out / "labels" / f"{self.in_paths(arm)}{number}.jsonl"
        )

    def in_paths(self, arm: str) -> str:
        """Return the name of an arm in file names."""
        return version_0_1.arm_in_paths(self.out, arm)

    def label_parts(self) -> list[Part]:
        """What labels further draws of pairs."""
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
                    f"--first-seed={FIRST_SEED + 20_000 * d}",
                    *more,
                    f"--out={self.draw(d)}",
                ),
            )
            for d in range(1, self.draws)
        ]

    def bundled(self, arm: str, draw: int, seed: int) -> bool:
        """Whether a reward is the bundled one, which has learnt from the bundled labels."""
        return (arm, draw, seed) == (LABELS, 0, 0) and self.labels == BUNDLED_LABELS and not self.train

    def reward_part(self, arm: str, draw: int, seed: int) -> Part:
        """The training of a reward on labels."""
        more = [f"--network={self.network}"] if self.network else []
        flags = [
            f"--labels={self.labels_of(arm, draw)}",
            f"--seed={seed}",
            f"--set=split_seed={seed}",
            *more,
            *self.train,
        ]
        folder = self.out / "rewards" / f"{self.in_paths(arm)}-d{draw}-r{seed}"
        return Part(
            f"reward: {arm}, draw {draw}, seed {seed}", folder, TRAIN_REWARD, (*flags, f"--run-dir={folder}")
        )

    def reward_parts(self) -> list[Part]:
        arms = [arm for arm in BY_LABELS if arm in self.arms]
        return [
            self.reward_part(arm, d, r)
            for arm in arms
            for d in range(self.draws)
            for r in range(self.rewards)
            if not self.bundled(arm, d, r)
        ]

    def reward(self, arm: str, draw: int = 0, seed: int = 0) -> Path:
        """The reward that an arm tunes by; made by `reward_parts` or `write_rewards`."""
        if arm in BY_LABELS:
            return (
                bundled.REWARD
                if self.bundled(arm, draw, seed)
                else self.reward_part(arm, draw, seed).folder / "reward.safetensors"
            )
        return self.out / "rewards" / f"{arm}{seed if arm == 'permuted' else ''}.safetensors"

    def tunings(self) -> dict[tuple[str, int, int, int], Part]:
        """By arm, training seed, draw and reward."""
        parts = {}
        for arm in self.arms:
            for case in self._cases(arm):
                seed, d, r = case
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
        """(training seed, draw, reward) of an arm."""
        if arm in (POST_PROCESSING, "truncation"):
            return
        draws = self.draws if arm in BY_LABELS else 1
        rewards = self.rewards if arm in (*BY_LABELS, "permuted") else 1
        yield from ((seed, d, r) for seed in self.seeds for d in range(draws) for r in range(rewards))


def write_labels_of_arms(plan: Plan) -> None:
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
    """Those that learn nothing."""
    if "smoothness" in plan.arms:
        Reward(Smoothness.of(load_generator(plan.network).generator), AsSeen()).save(
            plan.reward("smoothness")
        )
    for seed in range(plan.rewards if "permuted" in plan.arms else 0):
        permuted(load_reward(plan.reward(LABELS, 0, seed)), seed).save(plan.reward("permuted", 0, seed))


# What is seen of each arm's shapes.


GROUND_TRUTH = "ground-truth heads"
BEFORE = "before"
METHOD = "filter"  # array with the number of the chosen method; the name that version 0.1 wrote


def _task_of_psi(psi: float) -> str:
    return f"psi {psi:g}"


def _looker(
    folder: Path,
    inputs: Mapping[str, Mapping],
    network: Path | None,
    tuned: Mapping[str, Path],
    latents: int,
    held: HeldOut = LATENTS,
) -> Callable[[str], None]:
    """A process that looks at shapes, and keeps what it sees of a task in a store."""
    store = Store(folder, renew=True)
    torch.set_num_threads(1)
    load_plugins()
    before = load_generator(network).generator
    seeds = held.take(latents)
    targets = heads.ground_truth(before, seeds)
    features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None

    def seen(shapes: np.ndarray) -> dict:
        return heads.looked_at(shapes, targets) | (
            {"features": features.of_grids(shapes)} if features else {}
        )

    def work(task: str) -> dict:
        if task == GROUND_TRUTH:
            return {"features": features.of_grids(targets) if features else np.zeros((0, 0))}
        if task == POST_PROCESSING:
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
    """Measure the ground-truth heads, the heads before tuning and those of every arm; the results are kept in
    <out>/seen.
    """
    tasks = [GROUND_TRUTH, BEFORE, *tuned]
    tasks += [POST_PROCESSING] if POST_PROCESSING in plan.arms else []
    tasks += [_task_of_psi(psi) for psi in PSIS] if "truncation" in plan.arms else []
    shared = {
        "generator": file_hash(plan.network or bundled.GENERATOR),
        "features": file_hash(DEFAULT_ASSET) if DEFAULT_ASSET.is_file() else "",
        "latents": plan.latents,
    }
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


# From what was seen to the table.


def row(seen: Mapping, before: Mapping, reference: np.ndarray | None) -> dict:
    """One network's figures."""
    found = heads.figures(before, seen)
    del found["error_reduction_ci95"]
    return found | (
        {} if reference is None else {"shape_frechet": heads.shape_frechet(seen["features"], reference)}
    )


def arm(rows: Mapping[int, Sequence[dict]], errors: np.ndarray, before: Mapping) -> dict:
    """An arm's figures, each a list by training seed, the mean over its rewards.

    Args: rows: by training seed; errors: volume errors behind [S, N].
    """
    names = [name for name in next(iter(rows.values()))[0]]
    by_seed = {name: [_mean([one[name] for one in each]) for each in rows.values()] for name in names}
    return {
        **by_seed,
        "error_reduction_ci95": heads.interval(before, errors),
        "runs": {str(seed): list(each) for seed, each in rows.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def truncated(seen: Mapping[float, Mapping], share: float) -> float:
    """The largest psi at which as large a share of heads is intact; the one with the largest share where
    none is enough.
    """
    shares = {psi: float((heads.error(found) <= heads.DEFECTIVE).mean()) for psi, found in seen.items()}
    enough = [psi for psi, reached in shares.items() if reached >= share]
    return max(enough) if enough else max(shares, key=lambda psi: (shares[psi], psi))


def criterion(arms: Mapping[str, Mapping], primary_endpoints: Sequence[str]) -> dict:
    """Evaluate the pre-registered criterion: labels are lower than every other arm in each primary endpoint
    with every training seed, and degrade no more intact heads.

    Harm up to HARM counts as none.
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
        harmless = [mine is None or mine <= max(HARM, other or 0.0) for mine, other in pairs]
        against[name] = {
            "lower": lower,
            "no_more_harm": harmless,
            "beaten": all(map(all, lower.values())) and all(harmless),
        }
    return {
        "labels_win": bool(against) and all(one["beaten"] for one in against.values()),
        "against": against,
    }


def compare(plan: Plan, seen: Mapping[str, Mapping], names: Mapping[tuple[str, int, int, int], str]) -> dict:
    """Make controlled-study.json of what was measured. Args: names: the task of each tuning."""
    before = seen[BEFORE]
    reference = seen[GROUND_TRUTH]["features"] if len(seen[GROUND_TRUTH]["features"]) else None
    primary_endpoints = [
        name for name in PRIMARY_ENDPOINTS if name != "shape_frechet" or reference is not None
    ]
    shares = {}
    arms: dict[str, dict] = {}
    errors: dict[str, np.ndarray] = {}
    for name in plan.arms:
        cases = {seed: [names[case] for case in names if case[:2] == (name, seed)] for seed in plan.seeds}
        if name == POST_PROCESSING:
            cases = {seed: [POST_PROCESSING] for seed in plan.seeds}
        if name == "truncation":
            tried = {psi: seen[_task_of_psi(psi)] for psi in PSIS}
            shares = {
                seed: truncated(tried, _mean(arms[LABELS]["intact_share"][i : i + 1]) or 0.0)
                for i, seed in enumerate(plan.seeds)
            }
            cases = {seed: [_task_of_psi(psi)] for seed, psi in shares.items()}
        rows = {seed: [row(seen[task], before, reference) for task in tasks] for seed, tasks in cases.items()}
        errors[name] = np.stack(
            [np.mean([heads.error(seen[task]) for task in tasks], axis=0) for tasks in cases.values()]
        )
        arms[name] = arm(rows, errors[name], before)
    untuned = row(before, before, reference)
    for name in arms:
        gains = zip(arms[name]["error_defective"], arms[LABELS]["error_defective"], strict=True)
        arms[name]["share_of_gain"] = [_share(untuned["error_defective"], a, b) for a, b in gains]
        if name != LABELS:
            arms[name]["error_over_labels"] = _over(errors[name] - errors[LABELS], heads.defective(before))
    return {
        "primary_endpoints": primary_endpoints,
        "pre_registered": "2026-11-24",
        "seeds": list(plan.seeds),
        "rewards": plan.rewards,
        "label_sets": plan.draws,
        "latents": plan.latents,
        "defective": int(heads.defective(before).sum()),
        "before": untuned,
        "arms": arms,
        "post_processing": list(FILTERS)[int(seen[POST_PROCESSING][METHOD][0])]
        if POST_PROCESSING in seen
        else None,
        "psi": {str(seed): psi for seed, psi in shares.items()},
        "criterion": criterion(arms, primary_endpoints),
        "harm_allowed": HARM,
        "flags": {"tune": [*TUNED, *plan.tune], "train": list(plan.train)},
    }


def _share(before: float | None, after: float | None, best: float | None) -> float | None:
    if before is None or after is None or best is None or before == best:
        return None
    return (before - after) / (before - best)


def _over(difference: np.ndarray, ill: np.ndarray) -> dict | None:
    """Mean of differences [S, N] over seeds and defective heads, with its interval over both, and over seeds
    alone.
    """
    here = difference[:, ill]
    if not here.size:
        return None
    found = two_way_interval(lambda seeds, items: here[np.ix_(seeds, items)].mean(), *here.shape)
    over_seeds = t_mean_interval(here.mean(axis=1)) if len(here) > 1 else None
    return {
        "mean": float(here.mean()),
        "ci95": [found.lo, found.hi],
        "ci95_over_seeds": over_seeds and [over_seeds.lo, over_seeds.hi],
    }


FIGURES = {  # of the table: words and form
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
    """The table, and what it says."""
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
    found = data["criterion"]
    unbeaten = [ARMS[name] for name, one in found["against"].items() if not one["beaten"]]
    says = (
        "Labels beat every other arm in each primary endpoint with every training seed, and degrade no more"
        " intact heads."
        if found["labels_win"]
        else (
            "Not beaten in each primary endpoint with every training seed without degrading more heads:"
            f" {', '.join(unbeaten) or 'there was no other arm'}."
        )
    )
    text = (
        f"{data['latents']} held-out latents, ψ 1, {data['defective']} of them defective before tuning;"
        f" training seeds {', '.join(map(str, data['seeds']))}, {data['rewards']} reward(s) for each of"
        f" {data['label_sets']} set(s) of labels. Means over training seeds, in brackets the least and the"
        " greatest. Volume error, missing, extra: shares of the ground-truth head's back-of-head volume, of"
        f" defective heads; F-score at the back at one voxel, of defective heads. Degraded: by"
        f" {heads.WORSE}. Lengths in"
        " voxels of 64³. Changed: share of the back-of-head volume that became solid or empty."
    )
    return "\n".join(["# What repairs heads of people", "", says, "", *table, "", text, ""])


def plot(data: Mapping):
    """Each primary of every arm by training seed."""
    names = list(data["arms"])
    drawn, axes = style.figure(columns=len(data["primary_endpoints"]), size=(9.4, 1.4 + 0.3 * len(names)))
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
    return drawn


def commands(plan: Plan) -> dict[str, list[str]]:
    """The command of every part."""
    parts = [*plan.label_parts(), *plan.reward_parts(), *plan.tunings().values()]
    return {part.name: part.command() for part in parts}


def work(plan: Plan, jobs: int) -> list[Path]:
    """Make what is missing, look at all of it, and write controlled-study.json, .md and .png."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for write_more, parts, words in (
        (write_labels_of_arms, plan.label_parts(), "draws of labels"),
        (write_rewards, plan.reward_parts(), "rewards trained"),
    ):
        make_shown([[part] for part in parts], jobs, threads, words)
        write_more(plan)
    tunings = plan.tunings()
    make_shown([[part] for part in tunings.values()], jobs, threads, "networks tuned")
    networks = {part.name: path for part in tunings.values() if (path := part.network()) is not None}
    data = compare(plan, look(plan, networks, jobs), {case: part.name for case, part in tunings.items()})
    return write(data, plan.out, "controlled-study", markdown, plot)
