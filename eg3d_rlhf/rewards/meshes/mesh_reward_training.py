"""Train RewardCS on unpaired labels: minimise mean (r - score / 5)^2 - lambda D.

D is the Cauchy-Schwarz divergence between embeddings (of length 1) of preferred and other meshes. Batches
contain as many preferred meshes as others. The kernel's bandwidth is the median distance in the batch,
averaged over steps, with a lower limit: after each kind has contracted to a cluster, a narrow kernel has no
gradient at points in the wrong cluster. The published bandwidth, learning rate and batch size are unknown.
Letters: N meshes, P patches, C width.
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
    generate_meshes,
    randomised_labels,
    read,
    rotated,
    with_permuted_faces,
)
from eg3d_rlhf.rewards.meshes.model import RewardCS
from eg3d_rlhf.rewards.meshes.settings import MeshRewardTraining
from training import checkpoint
from training.phases import derive_seed
from training.storage import write_atomic

MOMENTUM = 0.9  # of the moving average of the bandwidth over steps
TINY = 1e-3  # least bandwidth of test figures


def meshes_of(options: MeshRewardTraining, on_shape: OnShape = None) -> MeshSet:
    """Read or generate the meshes of a training."""
    if options.data is not None:
        return read(options.data, options.read, on_shape)
    o = options
    return generate_meshes(o.source, o.shapes, o.read, o.resolution, o.data_seed, on_shape)


class MeshTraining:
    """Training that `state` and `load` continue bitwise identically after any step."""

    def __init__(self, options: MeshRewardTraining, meshes: MeshSet):
        self.o = o = options
        self.meshes = replace(meshes, patches=area_only(meshes.patches)) if o.area_only else meshes
        # The split depends on the data's seed, so that arms with other seeds share it.
        self.train, self.test = meshes.split(o.held_out, o.data_seed)
        if o.randomised:
            self.train = randomised_labels(self.train, o.seed)
        if o.batch // 2 > min(sum(label.preferred is kind for label in self.train) for kind in (True, False)):
            raise ValueError(
                "--set batch: half of a batch must not exceed the number of training meshes of either"
                f" kind, got {o.batch}. Use a smaller batch."
            )
        # The initialisation must not depend on the global random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(o.seed)
            self.reward = RewardCS(o.read, o.encoder, tuple(sorted(set(meshes.prompts))), o.resolution)
        # From training meshes only, so that held-out meshes influence nothing.
        self.reward.calibrate(self.meshes.select(self.train)[0])
        self.optimizer = torch.optim.AdamW(self.reward.parameters(), lr=o.lr, weight_decay=o.weight_decay)
        self.loss = PreferenceLoss(
            # All terms on pairs are switched off.
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
        self.bandwidth: float | None = None  # moving average; None before the first step
        self.done = 0  # finished steps

    def run(self, until: int) -> dict[str, float]:
        """Train up to step `until`, and return the means of the loss terms over the new steps."""
        # The order of batches depends only on the seed, so a resumed run skips the batches that it has used.
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
        """Update the network on one batch, and return its loss terms."""
        o = self.o
        warm = max(self.o.steps // 20, 1)
        for group in self.optimizer.param_groups:
            # Linear warm-up over the first twentieth of the steps, below a cosine decay to 0
            group["lr"] = o.lr * min((self.done + 1) / warm, 0.5 * (1 + np.cos(np.pi * self.done / o.steps)))
        patches, prompts = self.meshes.select(labels)
        # Every step has its own stream, so augmentation is the same after a resume.
        rng = torch.Generator().manual_seed(derive_seed(o.seed, "step", self.done))
        patches = with_permuted_faces(patches, rng)
        if o.turns:
            patches = rotated(
                patches,
                torch.randint(4, (len(labels),), generator=rng),
                torch.rand(len(labels), generator=rng) < 0.5,
            )
        scores, embedding = self.reward(patches, prompts, torch.rand(len(labels), generator=rng) < o.forget)
        # Smoothed over steps, with a lower limit (see the module's docstring).
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
            # Ramp of lambda from 0 to 1 over the first divergence_ramp of the steps
            terms["divergence"] = terms["divergence"] * min(self.done / (o.divergence_ramp * o.steps), 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        cast(torch.Tensor, sum(terms.values())).backward()
        # Stops with an error if a gradient is not finite, before it reaches the weights.
        torch.nn.utils.clip_grad_norm_(self.reward.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in terms.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return everything that changes during training, as tensors and JSON values."""
        # Prefixes separate the reward's tensors from the optimiser's.
        tensors = {f"reward.{name}": value for name, value in self.reward.state_dict().items()}
        return {**tensors, **checkpoint.optimizer_tensors("optim", self.optimizer)}, {
            "done": self.done,
            "bandwidth": self.bandwidth,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], meta: Mapping) -> None:
        """Restore what `state` returned."""
        self.reward.load_state_dict(below(tensors, "reward."))
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        self.done = meta["done"]
        self.bandwidth = meta["bandwidth"]

    @torch.no_grad()
    def report(self) -> dict:
        """Compute the figures of the held-out meshes.

        auc: also for each defect against all preferred meshes. divergence: D of both kinds at their median
        distance, without bias; divergence_v: with bias, as in training; divergence_fixed: without bias, at
        the bandwidth of `--bandwidth`, which is equal for all arms. silhouette: of the embeddings.
        """
        labels = self.test
        patches, prompts = self.meshes.select(labels)
        scores, points = self.reward.eval()(patches, prompts)
        kind = np.array([label.preferred is True for label in labels])
        defects = np.array([self.meshes.kinds[label.seed] for label in labels])
        values = scores.numpy()
        # Embeddings of both kinds, and the kernel's bandwidth
        embeddings = (
            points[torch.from_numpy(kind)],
            points[torch.from_numpy(~kind)],
            max(float(median_distance(points)), TINY),
        )
        figures = {
            "n": [int(kind.sum()), int((~kind).sum())],
            "auc": auc(values[kind], values[~kind]),
            "divergence": float(cs_divergence(*embeddings, "U")),
            "divergence_v": float(cs_divergence(*embeddings)),
            "divergence_fixed": float(cs_divergence(*embeddings[:2], self.o.bandwidth, "U")),
            "silhouette": silhouette(points.numpy(), kind),
        }
        known = sorted({str(name) for name in defects[~kind] if name})
        return {
            **figures,
            "auc_by_kind": {name: auc(values[kind], values[~kind & (defects == name)]) for name in known},
        }

    def finished(self) -> RewardCS:
        """Return the reward, with its test figures in the provenance."""
        with torch.no_grad():
            scores = self.reward.eval().score(*self.meshes.select(self.train))
        self.reward.provenance = {
            "method": "RewardCS (reconstructed)",
            "training": self.o.to_dict(),
            "held_out": self.report(),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
        }
        return self.reward


# Complete training of RewardCS in a run folder, and the table of its arms over seeds.

EVERY = 50  # steps between two checkpoints
REWARD = "reward.safetensors"
REPORT = "report.json"
TABLE = "table.json"
# Changes of the settings by arm; the arms after the first two are controls
ARMS: dict[str, dict] = {
    "lambda 1": {"divergence": 1.0},
    "lambda 0": {"divergence": 0.0},
    "randomised": {"randomised": True},
    "area only": {"area_only": True},
}


def run_training(training: MeshTraining, run: Run) -> dict:
    """Run the remaining steps of a training in its run folder, and return the held-out figures.

    Raises: StoppedError after a signal.
    """
    options = training.o
    # A resumed run continues from its last checkpoint.
    if any(run.folder.glob("checkpoint-*.safetensors")):
        training.load(*run.read())
    run.go_on(training.done, training.done // EVERY)
    with run.stoppable(), run.writing():
        while training.done < options.steps and not run.stop_requested:
            # Up to the next multiple of EVERY, where a checkpoint is written
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
    """Train every arm of ARMS with each training seed on the same meshes.

    Arms that table.json in `out` contains are skipped.

    Returns: {"training": settings, "rows": {"arm/seed": held-out figures}, "summary": see `summary`}.
    Raises: ValueError if table.json belongs to other settings.
    """
    path = out / TABLE
    settings = {
        # Arms and seeds change these settings, so they do not belong to the table.
        k: v
        for k, v in options.to_dict().items()
        if k not in ("seed", "divergence", "randomised", "area_only")
    }
    known = {"training": settings, "rows": {}}
    if path.is_file():
        known = version_0_1.mesh_table(json.loads(path.read_text()))
    # Through JSON, so that tuples become lists, as in the file.
    if known["training"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"--resume: {path} holds a table of other settings. Use the settings of that table, or another"
            " folder."
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
                # After each training, so that an interrupted table can be continued.
                write_atomic(
                    path, (json.dumps({"training": settings, "rows": rows}, indent=1) + "\n").encode()
                )
    return {"training": settings, "rows": rows, "summary": summary(rows)}


def summary(rows: dict[str, dict]) -> dict[str, dict]:
    """Summarise each arm over its seeds.

    Returns, by arm: mean and range of AUC, mean D at the arm's own bandwidth and at the common one, and mean
        AUC of
    each defect.
    """
    table = {}
    for arm in ARMS:
        # Row names are "arm/seed".
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
