"""Training of RewardCS on unpaired labels: mean (r - score / 5)^2 - lambda D, D the Cauchy-Schwarz divergence
of embeddings of length 1.

Batches hold as many preferred meshes as others. The kernel's width is the batch's median distance, averaged
over steps, but never below a floor: once both kinds have drawn together, a narrow kernel has no slope at
those that stand with the wrong ones. The published width, learning rate and batch are unknown. Letters: N
meshes, P patches, C width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.models.weights import below
from eg3d_rlhf.preferences.losses import PreferenceLoss, UnpairedOutput, cs_divergence, median_distance
from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, batches_of
from eg3d_rlhf.rewards.evaluation import auc, silhouette
from eg3d_rlhf.rewards.meshes.dataset import (
    MeshSet,
    OnShape,
    area_only,
    dealt,
    drawn,
    read,
    shuffled,
    turned,
)
from eg3d_rlhf.rewards.meshes.model import RewardCS
from eg3d_rlhf.rewards.meshes.settings import MeshRewardTraining
from training import checkpoint
from training.phases import derive_seed
from training.storage import write_atomic

# of the bandwidth over steps; least distance in figures
MOMENTUM = 0.9
TINY = 1e-3


def meshes_of(options: MeshRewardTraining, on_shape: OnShape = None) -> MeshSet:
    """Read or draw the meshes of a training."""
    if options.data is not None:
        return read(options.data, options.read, on_shape)
    o = options
    return drawn(o.source, o.shapes, o.read, o.resolution, o.data_seed, on_shape)


class MeshTraining:
    """A training that can be cut off: `state` after any step, and `load`, give the same reward to the last
    bit.
    """

    def __init__(self, options: MeshRewardTraining, meshes: MeshSet):
        self.o = o = options
        self.meshes = replace(meshes, patches=area_only(meshes.patches)) if o.area_only else meshes
        self.train, self.test = meshes.split(o.held_out, o.data_seed)
        if o.randomised:
            self.train = shuffled(self.train, o.seed)
        if o.batch // 2 > min(sum(label.preferred is kind for label in self.train) for kind in (True, False)):
            raise ValueError(
                "--set batch: expected at most as many of each kind as there are to learn from, got"
                f" {o.batch}. Lower it."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(o.seed)
            self.reward = RewardCS(o.read, o.encoder, tuple(sorted(set(meshes.prompts))), o.resolution)
        self.reward.calibrate(self.meshes.of(self.train)[0])
        self.optimizer = torch.optim.AdamW(self.reward.parameters(), lr=o.lr, weight_decay=o.weight_decay)
        self.loss = PreferenceLoss(
            LossWeights(
                pairs=0,
                scalar=0,
                bradley_terry=0,
                strength=0,
                reconstruction=0,
                regression=o.regression,
                divergence=o.divergence,
            )
        )
        self.bandwidth: float | None = None
        self.done = 0

    def run(self, until: int) -> dict[str, float]:
        """Go on to step `until`; returns the means of the terms."""
        batches = batches_of(self.train, self.o.batch, np.random.default_rng([self.o.seed, 4]))
        for _ in range(self.done):
            next(batches)
        self.reward.train()
        seen = []
        while self.done < until:
            seen.append(self._step(next(batches)))
            self.done += 1
        self.reward.eval()
        return {name: float(np.mean([terms[name] for terms in seen])) for name in (seen[0] if seen else ())}

    def _step(self, labels: Sequence[UnpairedPreference]) -> dict[str, float]:
        o = self.o
        warm = max(self.o.steps // 20, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * min((self.done + 1) / warm, 0.5 * (1 + np.cos(np.pi * self.done / o.steps)))
        patches, prompts = self.meshes.of(labels)
        draw = torch.Generator().manual_seed(derive_seed(o.seed, "step", self.done))
        patches = dealt(patches, draw)
        if o.turns:
            patches = turned(
                patches,
                torch.randint(4, (len(labels),), generator=draw),
                torch.rand(len(labels), generator=draw) < 0.5,
            )
        scores, embedding = self.reward(patches, prompts, torch.rand(len(labels), generator=draw) < o.forget)
        now = max(float(median_distance(embedding)), o.bandwidth)
        self.bandwidth = now if self.bandwidth is None else MOMENTUM * self.bandwidth + (1 - MOMENTUM) * now
        target = torch.tensor([label.target for label in labels])
        preferred = torch.tensor([label.preferred is True for label in labels])
        terms = self.loss.unpaired(
            UnpairedOutput(
                scalar=scores,
                target=target,
                embedding=embedding,
                preferred=preferred,
                bandwidth=self.bandwidth,
            )
        )
        if "divergence" in terms and o.divergence_ramp:
            terms["divergence"] = terms["divergence"] * min(self.done / (o.divergence_ramp * o.steps), 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        cast(torch.Tensor, sum(terms.values())).backward()
        torch.nn.utils.clip_grad_norm_(self.reward.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in terms.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Everything that changes, as tensors and JSON."""
        tensors = {f"reward.{name}": value for name, value in self.reward.state_dict().items()}
        return {**tensors, **checkpoint.optimizer_tensors("optim", self.optimizer)}, {
            "done": self.done,
            "bandwidth": self.bandwidth,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], meta: Mapping) -> None:
        """Inverse of `state`."""
        self.reward.load_state_dict(below(tensors, "reward."))
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        self.done = meta["done"]
        self.bandwidth = meta["bandwidth"]

    @torch.no_grad()
    def report(self) -> dict:
        """Figures of the held-out meshes: AUC, also of each defect against all preferred ones; D
        (without bias, and as it is trained on) of the two kinds at their median distance, without bias also
        at the width `--bandwidth`, which arms share; silhouette.
        """
        labels = self.test
        patches, prompts = self.meshes.of(labels)
        scores, points = self.reward.eval()(patches, prompts)
        kind = np.array([label.preferred is True for label in labels])
        defects = np.array([self.meshes.kinds[label.seed] for label in labels])
        values = scores.numpy()
        apart = (
            points[torch.from_numpy(kind)],
            points[torch.from_numpy(~kind)],
            max(float(median_distance(points)), TINY),
        )
        figures = {
            "n": [int(kind.sum()), int((~kind).sum())],
            "auc": auc(values[kind], values[~kind]),
            "divergence": float(cs_divergence(*apart, "U")),
            "divergence_v": float(cs_divergence(*apart)),
            "divergence_fixed": float(cs_divergence(*apart[:2], self.o.bandwidth, "U")),
            "silhouette": silhouette(points.numpy(), kind),
        }
        known = sorted({str(name) for name in defects[~kind] if name})
        return {
            **figures,
            "auc_by_kind": {name: auc(values[kind], values[~kind & (defects == name)]) for name in known},
        }

    def finished(self) -> RewardCS:
        """The reward with what it is worth."""
        with torch.no_grad():
            scores = self.reward.eval().score(*self.meshes.of(self.train))
        self.reward.provenance = {
            "method": "RewardCS (reconstructed)",
            "training": self.o.to_dict(),
            "held_out": self.report(),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
        }
        return self.reward


# A whole training of RewardCS in a run folder, and the table of its arms over seeds.

EVERY = 50  # steps between two states to go on from
REWARD = "reward.safetensors"
REPORT = "report.json"
TABLE = "table.json"
ARMS: dict[str, dict] = {
    "lambda 1": {"divergence": 1.0},
    "lambda 0": {"divergence": 0.0},
    "randomised": {"randomised": True},
    "area only": {"area_only": True},
}


def run_training(training: MeshTraining, run: Run) -> dict:
    """What is left of a training in its run folder; the held-out figures.

    Raises: StoppedError after a signal.
    """
    options = training.o
    if any(run.folder.glob("checkpoint-*.safetensors")):
        training.load(*run.read())
    run.go_on(training.done, training.done // EVERY)
    with run.stoppable(), run.writing():
        while training.done < options.steps and not run.stop_requested:
            means = training.run(min((training.done // EVERY + 1) * EVERY, options.steps))
            run.stats({"step": training.done, **means})
            run.status(
                {"step": training.done},
                training.done,
                options.steps,
                "step",
                {k: f"{v:.4f}" for k, v in means.items()},
            )
            run.checkpoint(training.done, *training.state())
        if training.done < options.steps:
            raise StoppedError(f"{run.stop_requested} after step {training.done}.")
        reward = training.finished()
        reward.save(run.folder / REWARD)
        run.write(REPORT, reward.provenance)
    return reward.provenance["held_out"]


def run_table(
    options: MeshRewardTraining,
    out: Path,
    seeds: Sequence[int],
    on_shape: OnShape = None,
    say: Callable[[str], object] = print,
) -> dict:
    """Train every arm of ARMS with each training seed on the same meshes; arms that table.json in `out` holds
    already are not trained again.

    Returns: {"training": settings, "rows": {"arm/seed": held-out figures}, "summary": see `summary`}.
    Raises: ValueError where table.json is of other settings.
    """
    path = out / TABLE
    settings = {
        k: v
        for k, v in options.to_dict().items()
        if k not in ("seed", "divergence", "randomised", "area_only")
    }
    known = {"training": settings, "rows": {}}
    if path.is_file():
        known = version_0_1.mesh_table(json.loads(path.read_text()))
    if known["training"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"--resume: expected a table of the same settings, got another in {path}. Name another folder."
        )
    meshes = meshes_of(options, on_shape)
    rows = known["rows"]
    for seed in seeds:
        for arm, changes in ARMS.items():
            if f"{arm}/{seed}" not in rows:
                training = MeshTraining(replace(options, seed=seed, **changes), meshes)
                training.run(options.steps)
                rows[f"{arm}/{seed}"] = figures = training.report()
                say(f"seed {seed}  {arm:9s}  AUC {figures['auc']:.3f}  D {figures['divergence']:.3f}")
                write_atomic(
                    path, (json.dumps({"training": settings, "rows": rows}, indent=1) + "\n").encode()
                )
    return {"training": settings, "rows": rows, "summary": summary(rows)}


def summary(rows: dict[str, dict]) -> dict[str, dict]:
    """Of each arm over its seeds: mean and range of AUC, mean D at its own width and at one that arms share,
    mean AUC of each defect.
    """
    table = {}
    for arm in ARMS:
        of_arm = [row for name, row in rows.items() if name.split("/")[0] == arm]
        if of_arm:
            scores = [row["auc"] for row in of_arm]
            kinds = {
                kind: float(np.mean([row["auc_by_kind"][kind] for row in of_arm]))
                for kind in of_arm[0]["auc_by_kind"]
            }
            table[arm] = {
                "n": len(of_arm),
                "auc": float(np.mean(scores)),
                "auc_range": [min(scores), max(scores)],
                **{
                    name: float(np.mean([row[name] for row in of_arm]))
                    for name in ("divergence", "divergence_fixed")
                },
                "auc_by_kind": kinds,
            }
    return table
