"""Train RewardCS (DreamCS, arXiv 2506.09814, reconstructed) on labels of single meshes.

The loss is w mean (r - score / 5)^2 - lambda D, where r is the predicted reward and D the Cauchy-Schwarz
divergence between the embeddings (of length 1) of preferred meshes and of all other meshes. Batches contain
equal numbers of both. The bandwidth of the divergence's kernel is the median distance in the batch, averaged
over steps, with a lower limit. The limit is needed because, when each kind has contracted to a cluster, a
narrow kernel has no gradient at points in the wrong cluster. The paper does not state bandwidth, learning
rate and batch size.
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
from eg3d_rlhf.models.weights import entries_below
from eg3d_rlhf.preferences.losses import PreferenceLoss, UnpairedOutput, cs_divergence, median_distance
from eg3d_rlhf.preferences.settings import LossWeights
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, endless_batches
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

MOMENTUM = 0.9  # momentum of the moving average of the bandwidth over steps
TINY = 1e-3  # least bandwidth of the divergence of held-out meshes


def open_meshes(options: MeshRewardTraining, on_shape: OnShape = None) -> MeshSet:
    """Read the meshes of `options.data`, or generate meshes if it is None.

    Args:
        options: settings of the training.
        on_shape: function that is called with 1 after each mesh.
    """
    if options.data is not None:
        return read(options.data, options.patch_options, on_shape)
    return generate_meshes(
        options.source, options.shapes, options.patch_options, options.resolution, options.data_seed, on_shape
    )


class MeshTraining:
    """Training of RewardCS, which can be interrupted after any step and resumed bitwise identically.

    Args:
        options: settings of the training.
        meshes: meshes with labels.
    Raises: ValueError if there are too few meshes.
    """

    def __init__(self, options: MeshRewardTraining, meshes: MeshSet):
        self.options = options
        self.meshes = meshes
        if options.area_only:
            self.meshes = replace(meshes, patches=area_only(meshes.patches))
        # The split depends on the seed of the data only, so that trainings with other seeds share it.
        self.train, self.test = meshes.split(options.held_out, options.data_seed)
        if options.randomised:
            self.train = randomised_labels(self.train, options.seed)
        preferred_count = sum(label.preferred is True for label in self.train)
        other_count = sum(label.preferred is False for label in self.train)
        if options.batch // 2 > min(preferred_count, other_count):
            raise ValueError(
                f"--set batch={options.batch}: half of a batch must not exceed the number of training meshes"
                f" of either kind, which are {preferred_count} preferred and {other_count} other meshes. Use"
                " a smaller batch."
            )
        # A separate random state, so that the initialisation depends only on the seed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.reward = RewardCS(
                options.patch_options, options.encoder, tuple(sorted(set(meshes.prompts))), options.resolution
            )
        # Training meshes only, so that held-out meshes have no influence on the reward.
        self.reward.calibrate(self.meshes.select(self.train)[0])
        self.optimizer = torch.optim.AdamW(
            self.reward.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.loss = PreferenceLoss(
            # All terms on pairs are switched off.
            LossWeights(
                pairs=0,
                scalar=0,
                bradley_terry=0,
                strength=0,
                reconstruction=0,
                regression=options.regression,
                divergence=options.divergence,
            )
        )
        self.bandwidth: float | None = None  # moving average over steps; None before the first step
        self.finished_steps = 0

    def run(self, until: int) -> dict[str, float]:
        """Train until `until` steps are finished, and return the means of the loss terms over the new steps.

        The result is empty if there are no new steps.
        """
        # The order of batches depends only on the seed, so a resumed run skips the batches that it has used.
        batch_rng = np.random.default_rng([self.options.seed, 4])
        batches = endless_batches(self.train, self.options.batch, batch_rng)
        for _ in range(self.finished_steps):
            next(batches)
        self.reward.train()
        step_terms = []
        while self.finished_steps < until:
            step_terms.append(self._step(next(batches)))
            self.finished_steps += 1
        self.reward.eval()
        names = step_terms[0] if step_terms else ()
        return {name: float(np.mean([terms[name] for terms in step_terms])) for name in names}

    def _step(self, labels: Sequence[UnpairedPreference]) -> dict[str, float]:
        """Update the network on the meshes of one batch of labels, and return the loss terms by name."""
        options = self.options
        step = self.finished_steps
        warmup_steps = max(options.steps // 20, 1)
        for group in self.optimizer.param_groups:
            # Linear warm-up over the first twentieth of the steps, limited by a cosine decay to 0
            decay = 0.5 * (1 + np.cos(np.pi * step / options.steps))
            group["lr"] = options.lr * min((step + 1) / warmup_steps, decay)
        patches, prompts = self.meshes.select(labels)
        # Every step has its own random numbers, so the augmentation is the same in a run that is resumed.
        rng = torch.Generator().manual_seed(derive_seed(options.seed, "step", step))
        patches = with_permuted_faces(patches, rng)
        if options.turns:
            quarter_turns = torch.randint(4, (len(labels),), generator=rng)
            mirrored = torch.rand(len(labels), generator=rng) < 0.5
            patches = rotated(patches, quarter_turns, mirrored)
        unknown = torch.rand(len(labels), generator=rng) < options.forget
        scores, embedding = self.reward(patches, prompts, unknown)
        # Averaged over steps, with a lower limit; see the docstring of the module.
        step_bandwidth = max(float(median_distance(embedding)), options.bandwidth)
        if self.bandwidth is None:
            self.bandwidth = step_bandwidth
        else:
            self.bandwidth = MOMENTUM * self.bandwidth + (1 - MOMENTUM) * step_bandwidth
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
        if "divergence" in terms and options.divergence_ramp:
            # The weight increases linearly over the first steps, see --divergence-ramp.
            ramp_steps = options.divergence_ramp * options.steps
            terms["divergence"] = terms["divergence"] * min(step / ramp_steps, 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        cast(torch.Tensor, sum(terms.values())).backward()
        # A gradient that is not finite raises an error here, before it changes the weights.
        torch.nn.utils.clip_grad_norm_(self.reward.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in terms.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return everything that changes during training, as tensors by name and as JSON values."""
        # Prefixes separate the tensors of the reward from those of the optimiser.
        tensors = {f"reward.{name}": value for name, value in self.reward.state_dict().items()}
        return {**tensors, **checkpoint.optimizer_tensors("optim", self.optimizer)}, {
            "done": self.finished_steps,
            "bandwidth": self.bandwidth,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], meta: Mapping) -> None:
        """Restore the training from the tensors and the JSON values that `state` returned."""
        self.reward.load_state_dict(entries_below(tensors, "reward."))
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        self.finished_steps = meta["done"]
        self.bandwidth = meta["bandwidth"]

    @torch.no_grad()
    def report(self) -> dict:
        """Evaluate the reward on the held-out meshes.

        Returns: JSON values. "n" are the numbers of preferred and of other meshes, and "auc" is the AUC of
            the scores of both. "auc_by_kind" is, for each kind of defect, the AUC of meshes with this defect
            against all preferred meshes. "divergence" is the unbiased estimate of D with the median distance
            as bandwidth, "divergence_v" is the biased estimate, which training uses, and "divergence_fixed"
            is the unbiased estimate with the bandwidth of the settings, so that trainings can be compared.
            "silhouette" is the mean silhouette of the embeddings.
        """
        labels = self.test
        patches, prompts = self.meshes.select(labels)
        scores, points = self.reward.eval()(patches, prompts)
        is_preferred = np.array([label.preferred is True for label in labels])
        defects = np.array([self.meshes.kinds[label.seed] for label in labels])
        values = scores.numpy()
        preferred_points = points[torch.from_numpy(is_preferred)]
        other_points = points[torch.from_numpy(~is_preferred)]
        bandwidth = max(float(median_distance(points)), TINY)
        fixed_bandwidth = self.options.bandwidth
        report = {
            "n": [int(is_preferred.sum()), int((~is_preferred).sum())],
            "auc": auc(values[is_preferred], values[~is_preferred]),
            "divergence": float(cs_divergence(preferred_points, other_points, bandwidth, "U")),
            "divergence_v": float(cs_divergence(preferred_points, other_points, bandwidth)),
            "divergence_fixed": float(cs_divergence(preferred_points, other_points, fixed_bandwidth, "U")),
            "silhouette": silhouette(points.numpy(), is_preferred),
        }
        # Defects of meshes of the user are '', and are left out.
        kinds = sorted({str(name) for name in defects[~is_preferred] if name})
        report["auc_by_kind"] = {
            name: auc(values[is_preferred], values[~is_preferred & (defects == name)]) for name in kinds
        }
        return report

    def finished(self) -> RewardCS:
        """Return the reward, with its settings and its results on the held-out meshes as provenance."""
        with torch.no_grad():
            scores = self.reward.eval().score(*self.meshes.select(self.train))
        self.reward.provenance = {
            "method": "RewardCS (reconstructed)",
            "training": self.options.to_dict(),
            "held_out": self.report(),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
        }
        return self.reward


# Complete training of RewardCS in a run folder; and a table that compares several trainings (arms), each with
# several random seeds.

EVERY = 50  # number of steps between two checkpoints
REWARD = "reward.safetensors"
REPORT = "report.json"
TABLE = "table.json"
# Changed settings of each arm. "randomised" and "area only" are controls.
ARMS: dict[str, dict] = {
    "lambda 1": {"divergence": 1.0},
    "lambda 0": {"divergence": 0.0},
    "randomised": {"randomised": True},
    "area only": {"area_only": True},
}


def run_training(training: MeshTraining, run: Run) -> dict:
    """Run the remaining steps of a training in its run folder, and write the reward and its report.

    Args:
        training: training, new or to be resumed.
        run: run with its folder.
    Returns: results on the held-out meshes, see `MeshTraining.report`.
    Raises: StoppedError after SIGTERM or SIGINT.
    """
    options = training.options
    # A resumed run continues from its last checkpoint.
    if any(run.folder.glob("checkpoint-*.safetensors")):
        training.load(*run.read())
    run.continue_from(training.finished_steps, training.finished_steps // EVERY)
    with run.stoppable(), run.writing():
        while training.finished_steps < options.steps and not run.stop_requested:
            # Train up to the next multiple of EVERY, where a checkpoint is written.
            next_checkpoint = (training.finished_steps // EVERY + 1) * EVERY
            means = training.run(min(next_checkpoint, options.steps))
            run.stats({"step": training.finished_steps, **means})
            run.status(
                {"step": training.finished_steps},
                training.finished_steps,
                options.steps,
                "step",
                {name: f"{value:.4f}" for name, value in means.items()},
            )
            run.checkpoint(training.finished_steps, *training.state())
        if training.finished_steps < options.steps:
            raise StoppedError(f"{run.stop_requested} after step {training.finished_steps}.")
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
    """Train every arm of ARMS with each training seed on the same meshes, and write table.json.

    Trainings whose results table.json already contains are skipped.

    Args:
        options: settings that all trainings share.
        out: folder of table.json.
        seeds: training seeds.
        on_shape: function that is called with 1 after each mesh that is read or generated.
        say: function that shows a line of text after each training.
    Returns: {"training": settings, "rows": {"arm/seed": results of `MeshTraining.report`}, "summary": result
        of `summary`}.
    Raises: ValueError if table.json contains results of other settings.
    """
    path = out / TABLE
    # Arms and seeds change these settings, so the record of the table leaves them out.
    changed_names = ("seed", "divergence", "randomised", "area_only")
    settings = {name: value for name, value in options.to_dict().items() if name not in changed_names}
    table = {"training": settings, "rows": {}}
    if path.is_file():
        table = version_0_1.mesh_table(json.loads(path.read_text()))
    # A conversion to JSON and back turns tuples into lists, as in the file.
    if table["training"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"--resume: {path} contains results of trainings with other settings. Pass the settings of that"
            " table, or use another --outdir."
        )
    meshes = open_meshes(options, on_shape)
    rows = table["rows"]
    for seed in seeds:
        for arm, changes in ARMS.items():
            if f"{arm}/{seed}" not in rows:
                training = MeshTraining(replace(options, seed=seed, **changes), meshes)
                training.run(options.steps)
                report = training.report()
                rows[f"{arm}/{seed}"] = report
                say(f"seed {seed}  {arm:9s}  AUC {report['auc']:.3f}  D {report['divergence']:.3f}")
                # The file is written after each training, so that an interrupted table can be resumed.
                write_atomic(
                    path, (json.dumps({"training": settings, "rows": rows}, indent=1) + "\n").encode()
                )
    return {"training": settings, "rows": rows, "summary": summary(rows)}


def summary(rows: dict[str, dict]) -> dict[str, dict]:
    """Summarise the results of each arm over its seeds.

    Args: rows: results of `MeshTraining.report`, by "arm/seed".
    Returns: by arm, the number of trainings "n", mean "auc" and least and greatest value "auc_range", mean
        "divergence" and "divergence_fixed", and mean "auc_by_kind". Arms without results are left out.
    """
    table = {}
    for arm in ARMS:
        arm_rows = [row for name, row in rows.items() if name.split("/")[0] == arm]
        if not arm_rows:
            continue
        aucs = [row["auc"] for row in arm_rows]
        auc_by_kind = {
            kind: float(np.mean([row["auc_by_kind"][kind] for row in arm_rows]))
            for kind in arm_rows[0]["auc_by_kind"]
        }
        table[arm] = {
            "n": len(arm_rows),
            "auc": float(np.mean(aucs)),
            "auc_range": [min(aucs), max(aucs)],
            "divergence": float(np.mean([row["divergence"] for row in arm_rows])),
            "divergence_fixed": float(np.mean([row["divergence_fixed"] for row in arm_rows])),
            "auc_by_kind": auc_by_kind,
        }
    return table
