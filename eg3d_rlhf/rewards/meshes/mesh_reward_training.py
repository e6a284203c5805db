"""Train RewardCS (DreamCS, arXiv 2506.09814, reconstructed) on labels of single meshes.

The loss is w mean (r - score / 5)^2 - lambda D, where r is the predicted reward and D the Cauchy-Schwarz
divergence between the embeddings (of length 1) of preferred meshes and of all other meshes. One half of a
batch are preferred meshes. The bandwidth of the divergence's kernel is the median distance in the batch,
averaged over steps, with a lower limit. The limit is needed because preferred meshes contract to a cluster,
as do all other meshes: a narrow kernel then has no gradient at points in the wrong cluster. The paper does
not state bandwidth, learning rate and batch size.
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
TINY = 1e-3  # smallest bandwidth of the divergence of held-out meshes


def open_meshes(options: MeshRewardTraining, on_shape: OnShape = None) -> MeshSet:
    """Read the meshes that the file `options.data` lists, or generate meshes if `options.data` is None.

    Args:
        options: settings of the training, which also state how meshes are converted to patches.
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
        meshes: meshes with labels, which are split into training meshes and held-out meshes here.
    Raises: ValueError if there are too few preferred meshes or too few other meshes.
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
                f"--set batch={options.batch}: one half of a batch are preferred meshes and the other half"
                f" are not, but there are only {preferred_count} preferred and {other_count} other meshes for"
                " the training. Use a smaller batch."
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

    def run(self, last_step: int) -> dict[str, float]:
        """Train until `last_step` steps are finished, counted from the start of the training.

        Returns: means of the loss terms over the new steps, by name; empty if there are no new steps.
        """
        # The order of batches depends only on the seed, so a resumed run skips the batches that it has used.
        batch_rng = np.random.default_rng([self.options.seed, 4])
        label_batches = endless_batches(self.train, self.options.batch, batch_rng)
        for _ in range(self.finished_steps):
            next(label_batches)
        self.reward.train()
        step_terms = []
        while self.finished_steps < last_step:
            step_terms.append(self._step(next(label_batches)))
            self.finished_steps += 1
        self.reward.eval()
        term_names = step_terms[0] if step_terms else ()
        return {
            term_name: float(np.mean([loss_terms[term_name] for loss_terms in step_terms]))
            for term_name in term_names
        }

    def _step(self, labels: Sequence[UnpairedPreference]) -> dict[str, float]:
        """Update the network on the meshes of one batch of labels, and return the loss terms by name."""
        options = self.options
        step_index = self.finished_steps
        warmup_steps = max(options.steps // 20, 1)
        for param_group in self.optimizer.param_groups:
            # Linear warm-up over the first twentieth of the steps, limited by a cosine decay to 0
            decay = 0.5 * (1 + np.cos(np.pi * step_index / options.steps))
            param_group["lr"] = options.lr * min((step_index + 1) / warmup_steps, decay)
        patches, prompts = self.meshes.select(labels)
        # Every step has its own random numbers, so the augmentation is the same in a run that is resumed.
        rng = torch.Generator().manual_seed(derive_seed(options.seed, "step", step_index))
        patches = with_permuted_faces(patches, rng)
        if options.turns:
            quarter_turns = torch.randint(4, (len(labels),), generator=rng)
            is_mirrored = torch.rand(len(labels), generator=rng) < 0.5
            patches = rotated(patches, quarter_turns, is_mirrored)
        is_unknown = torch.rand(len(labels), generator=rng) < options.forget
        scores, embedding = self.reward(patches, prompts, is_unknown)
        # Averaged over steps, with a lower limit; see the docstring of the module.
        step_bandwidth = max(float(median_distance(embedding)), options.bandwidth)
        if self.bandwidth is None:
            self.bandwidth = step_bandwidth
        else:
            self.bandwidth = MOMENTUM * self.bandwidth + (1 - MOMENTUM) * step_bandwidth
        target_rewards = torch.tensor([label.target for label in labels])
        is_preferred = torch.tensor([label.preferred is True for label in labels])
        loss_terms = self.loss.unpaired(
            UnpairedOutput(
                scalar=scores,
                target=target_rewards,
                embedding=embedding,
                preferred=is_preferred,
                bandwidth=self.bandwidth,
            )
        )
        if "divergence" in loss_terms and options.divergence_ramp:
            # The weight increases linearly over the first steps, see --divergence-ramp.
            ramp_steps = options.divergence_ramp * options.steps
            loss_terms["divergence"] = loss_terms["divergence"] * min(step_index / ramp_steps, 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        cast(torch.Tensor, sum(loss_terms.values())).backward()
        # A gradient that is not finite raises an error here, before it changes the weights.
        torch.nn.utils.clip_grad_norm_(self.reward.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        return {term_name: float(loss_term.detach()) for term_name, loss_term in loss_terms.items()}

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return everything that changes during training, as tensors by name and as JSON values."""
        # Prefixes separate the tensors of the reward from those of the optimiser.
        tensors = {f"reward.{name}": value for name, value in self.reward.state_dict().items()}
        return {**tensors, **checkpoint.optimizer_tensors("optim", self.optimizer)}, {
            "done": self.finished_steps,
            "bandwidth": self.bandwidth,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], json_values: Mapping) -> None:
        """Restore the training from the tensors and the JSON values that `state` returned."""
        self.reward.load_state_dict(entries_below(tensors, "reward."))
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        self.finished_steps = json_values["done"]
        self.bandwidth = json_values["bandwidth"]

    @torch.no_grad()
    def report(self) -> dict:
        """Evaluate the reward on the held-out meshes.

        Returns: dict of JSON values. "n" are the numbers of preferred and of other meshes, and "auc" is the
            AUC of the scores of preferred meshes against other meshes. "auc_by_kind" is, for each kind of
            defect, the AUC of all preferred meshes against the other meshes with this defect. "divergence" is
            the unbiased estimate of the Cauchy-Schwarz divergence with the median distance as bandwidth,
            "divergence_v" is the biased estimate, which training uses, and "divergence_fixed" is the unbiased
            estimate with the bandwidth of the settings, so that trainings can be compared. "silhouette" is
            the mean silhouette of the embeddings.
        """
        labels = self.test
        patches, prompts = self.meshes.select(labels)
        scores, embeddings = self.reward.eval()(patches, prompts)
        is_preferred = np.array([label.preferred is True for label in labels])
        defect_of_mesh = np.array([self.meshes.kinds[label.seed] for label in labels])
        score_array = scores.numpy()
        preferred_embeddings = embeddings[torch.from_numpy(is_preferred)]
        other_embeddings = embeddings[torch.from_numpy(~is_preferred)]
        bandwidth = max(float(median_distance(embeddings)), TINY)
        fixed_bandwidth = self.options.bandwidth
        report_values = {
            # Different meshes, since several labels of one mesh are no new evidence.
            "n": [
                len({label.seed for label in labels if label.preferred is True}),
                len({label.seed for label in labels if label.preferred is not True}),
            ],
            "auc": auc(score_array[is_preferred], score_array[~is_preferred]),
            "divergence": float(cs_divergence(preferred_embeddings, other_embeddings, bandwidth, "U")),
            "divergence_v": float(cs_divergence(preferred_embeddings, other_embeddings, bandwidth)),
            "divergence_fixed": float(
                cs_divergence(preferred_embeddings, other_embeddings, fixed_bandwidth, "U")
            ),
            "silhouette": silhouette(embeddings.numpy(), is_preferred),
        }
        # Defects of meshes of the user are '', and are left out.
        defect_names = sorted(
            {str(defect_name) for defect_name in defect_of_mesh[~is_preferred] if defect_name}
        )
        report_values["auc_by_kind"] = {
            defect_name: auc(
                score_array[is_preferred], score_array[~is_preferred & (defect_of_mesh == defect_name)]
            )
            for defect_name in defect_names
        }
        return report_values

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


# Complete training of RewardCS in a run folder, and a table that compares several trainings (arms), each with
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
            mean_loss_terms = training.run(min(next_checkpoint, options.steps))
            run.stats({"step": training.finished_steps, **mean_loss_terms})
            run.status(
                {"step": training.finished_steps},
                training.finished_steps,
                options.steps,
                "step",
                {term_name: f"{mean_value:.4f}" for term_name, mean_value in mean_loss_terms.items()},
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
    table_folder: Path,
    seeds: Sequence[int],
    on_shape: OnShape = None,
    say: Callable[[str], object] = print,
) -> dict:
    """Train every arm of ARMS with each training seed on the same meshes, and write table.json.

    Trainings whose results table.json already contains are skipped.

    Args:
        options: settings that all trainings share.
        table_folder: folder of table.json.
        seeds: training seeds.
        on_shape: function that is called with 1 after each mesh that is read or generated.
        say: function that shows a line of text after each training.
    Returns: dict with three entries. "training" are the settings that all trainings share, "rows" are the
        results of `MeshTraining.report` by "arm/seed", and "summary" is the result of `summary`.
    Raises: ValueError if table.json contains results of other settings.
    """
    table_path = table_folder / TABLE
    # Arms and seeds change these settings, so the record of the table leaves them out.
    changed_names = ("seed", "divergence", "randomised", "area_only")
    shared_settings = {name: value for name, value in options.to_dict().items() if name not in changed_names}
    stored_table = {"training": shared_settings, "rows": {}}
    if table_path.is_file():
        stored_table = version_0_1.mesh_table(json.loads(table_path.read_text()))
    # A conversion to JSON and back turns tuples into lists, as in the file.
    if stored_table["training"] != json.loads(json.dumps(shared_settings)):
        raise ValueError(
            f"--resume: {table_path} contains results of trainings with other settings. Pass the settings of"
            " that table, or use another --outdir."
        )
    meshes = open_meshes(options, on_shape)
    results_by_arm_and_seed = stored_table["rows"]
    for seed in seeds:
        for arm, changed_settings in ARMS.items():
            if f"{arm}/{seed}" not in results_by_arm_and_seed:
                training = MeshTraining(replace(options, seed=seed, **changed_settings), meshes)
                training.run(options.steps)
                held_out_results = training.report()
                results_by_arm_and_seed[f"{arm}/{seed}"] = held_out_results
                say(
                    f"seed {seed}  {arm:9s}  AUC {held_out_results['auc']:.3f}  D"
                    f" {held_out_results['divergence']:.3f}"
                )
                # The file is written after each training, so that an interrupted table can be resumed.
                write_atomic(
                    table_path,
                    (
                        json.dumps({"training": shared_settings, "rows": results_by_arm_and_seed}, indent=1)
                        + "\n"
                    ).encode(),
                )
    return {
        "training": shared_settings,
        "rows": results_by_arm_and_seed,
        "summary": summary(results_by_arm_and_seed),
    }


def summary(rows: dict[str, dict]) -> dict[str, dict]:
    """Summarise the results of each arm over its seeds.

    Args: rows: results of `MeshTraining.report`, by "arm/seed".
    Returns: dict from each arm to a dict of JSON values. "n" is the number of trainings. "auc",
        "auc_by_kind", "divergence" and "divergence_fixed" are means over the trainings. "auc_range" are the
        smallest and the largest AUC. Arms without results are left out.
    """
    summary_by_arm = {}
    for arm in ARMS:
        arm_results = [
            arm_result for arm_and_seed, arm_result in rows.items() if arm_and_seed.split("/")[0] == arm
        ]
        if not arm_results:
            continue
        auc_values = [arm_result["auc"] for arm_result in arm_results]
        auc_by_kind = {
            defect_kind: float(
                np.mean([arm_result["auc_by_kind"][defect_kind] for arm_result in arm_results])
            )
            for defect_kind in arm_results[0]["auc_by_kind"]
        }
        summary_by_arm[arm] = {
            "n": len(arm_results),
            "auc": float(np.mean(auc_values)),
            "auc_range": [min(auc_values), max(auc_values)],
            "divergence": float(np.mean([arm_result["divergence"] for arm_result in arm_results])),
            "divergence_fixed": float(
                np.mean([arm_result["divergence_fixed"] for arm_result in arm_results])
            ),
            "auc_by_kind": auc_by_kind,
        }
    return summary_by_arm
