"""Training of RewardCS on unpaired labels: mean (r - score / 5)^2 - lambda D, D the Cauchy-Schwarz divergence
of embeddings of length 1.

Batches hold as many preferred meshes as others. The kernel's width is the batch's median distance, averaged
over steps, but never below a floor: once both kinds have drawn together, a narrow kernel has no slope at
those that stand with the wrong ones. The published width, learning rate and batch are unknown. Letters: N
meshes, P patches, C width.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from eg3d_rlhf.experiments.process import StoppedError
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.preferences.losses import (
    LossWeights,
    PreferenceLoss,
    UnpairedOutput,
    cs_divergence,
    median_distance,
)
from eg3d_rlhf.preferences.unpaired import UnpairedPreference, batches_of
from eg3d_rlhf.rewards.evaluation import auc, silhouette
from eg3d_rlhf.rewards.meshes.dataset import (
    SOURCES,
    MeshSet,
    OnShape,
    area_only,
    dealt,
    drawn,
    read,
    shuffled,
    turned,
)
from eg3d_rlhf.rewards.meshes.model import EncoderOptions, RewardCS
from eg3d_rlhf.rewards.meshes.patches import PATCHIFIERS, PatchOptions
from eg3d_rlhf.rewards.meshes.patchifiers import AREAS, PLACES
from training import checkpoint
from training.config import check_knobs, knob
from training.phases import derive_seed
from training.storage import write_atomic

DATA = "Data"
NET = "Network"
TRAIN = "Training"
# of the bandwidth over steps; least distance in figures
MOMENTUM = 0.9
TINY = 1e-3
_rare_train_knob = functools.partial(knob, group=TRAIN, rare=True)
_net_knob = functools.partial(knob, group=NET, rare=True)


@dataclass(frozen=True, kw_only=True)
class MeshRewardTraining:
    """One training; with one thread it repeats to the byte on the same machine."""

    source: str = knob(
        "heads", "Drawn meshes: smooth heads, or the default problem's objects.", DATA, choices=tuple(SOURCES)
    )
    data: Path | None = knob(
        None,
        "Meshes with scores or labels, .jsonl, in place of drawn ones.",
        DATA,
        metavar="FILE",
        shown="none",
    )
    shapes: int = knob(840, "Drawn meshes; one in 20 lies between the thresholds.", DATA, low=20)
    data_seed: int = knob(
        0, "Of the drawn meshes and of which are held out, whatever --seed is.", DATA, low=0, rare=True
    )
    held_out: float = knob(0.25, "Share of the meshes for the figures.", DATA, above=0, below=1, rare=True)
    resolution: int = knob(20, "Cells of the lattice per edge.", DATA, low=4, high=128, rare=True)
    patchifier: str = _net_knob("regions", "How meshes become patches.", choices=tuple(PATCHIFIERS))
    patches: int = _net_knob(64, "Patches of a mesh.", low=4)
    faces: int = _net_knob(64, "Faces of a patch.", low=1)
    area: str = _net_knob("share", "Areas as shares of the mesh's, or as they are.", choices=AREAS)
    place: str = _net_knob(
        "centre",
        "Where centres are measured from: the surface's, its box's least corner, the origin.",
        choices=PLACES,
    )
    width: int = _net_knob(64, "Width of the encoder.", low=4)
    depth: int = _net_knob(3, "Blocks of the encoder.", low=0)
    heads: int = _net_knob(4, "Heads of attention.", low=1)
    divergence: float = knob(1.0, "Weight lambda of the Cauchy-Schwarz term.", TRAIN, low=0)
    divergence_ramp: float = _rare_train_knob(
        0.5, "Share of the steps over which lambda rises from 0: scores are learnt first.", low=0, high=1
    )
    bandwidth: float = _rare_train_knob(
        0.7, "Least width of the kernel; the batch's median distance where that is larger.", above=0
    )
    regression: float = _rare_train_knob(
        25.0, "Weight of the squared error of score / 5: 25 counts it in units of the score.", above=0
    )
    steps: int = knob(400, "Updates.", TRAIN, low=1)
    batch: int = _rare_train_knob(64, "Meshes of an update, half of each kind.", low=4)
    lr: float = knob(1e-3, "Of AdamW, after a warm-up, falling to 0 along a cosine.", TRAIN, above=0)
    weight_decay: float = _rare_train_knob(0.05, "Of AdamW.", low=0)
    forget: float = _rare_train_knob(0.25, "Share of prompts that are taken as unknown.", low=0, high=1)
    turns: bool = _rare_train_knob(
        True, "Turn meshes by random quarters about the upward axis, and mirror them."
    )
    shuffled: bool = _rare_train_knob(
        False, "A control: deal the labels anew. AUC must then be near one half."
    )
    area_only: bool = _rare_train_knob(False, "A control: read areas alone. It must not see a second nose.")
    seed: int = knob(0, "Of initialisation and order.", TRAIN, low=0, flag=False)

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.batch % 2:
            raise ValueError(
                f"--set batch: expected an even number, got {self.batch}. Half of each kind are drawn."
            )
        if self.turns and self.place == "box":
            raise ValueError(
                "place: expected centre or world with turns, got box, which no mesh is turned about. Add"
                " --set turns=false."
            )
        self.encoder, self.read  # noqa: B018  their own checks

    def to_dict(self) -> dict:
        """JSON values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }

    @property
    def read(self) -> PatchOptions:
        """How meshes become patches."""
        return PatchOptions(
            kind=self.patchifier, patches=self.patches, faces=self.faces, area=self.area, place=self.place
        )

    @property
    def encoder(self) -> EncoderOptions:
        """Sizes of the network."""
        return EncoderOptions(faces=self.faces, width=self.width, depth=self.depth, heads=self.heads)

    def meshes(self, on_shape: OnShape = None) -> MeshSet:
        """The data."""
        if self.data is not None:
            return read(self.data, self.read, on_shape)
        return drawn(self.source, self.shapes, self.read, self.resolution, self.data_seed, on_shape)


class MeshTraining:
    """A training that can be cut off: `state` after any step, and `load`, give the same reward to the last
    bit.
    """

    def __init__(self, options: MeshRewardTraining, meshes: MeshSet):
        self.o = o = options
        self.meshes = replace(meshes, patches=area_only(meshes.patches)) if o.area_only else meshes
        self.train, self.test = meshes.split(o.held_out, o.data_seed)
        if o.shuffled:
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
        prefix = "reward."
        self.reward.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
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
    "shuffled": {"shuffled": True},
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
    seeds: int,
    on_shape: OnShape = None,
    say: Callable[[str], object] = print,
) -> dict:
    """Every arm of ARMS with seeds 0.. on the same meshes; arms that table.json in `out` holds already are
    not trained again.

    Returns: {"training": settings, "rows": {"arm/seed": held-out figures}, "summary": see `summary`}.
    Raises: ValueError where table.json is of other settings.
    """
    path = out / TABLE
    settings = {
        k: v for k, v in options.to_dict().items() if k not in ("seed", "divergence", "shuffled", "area_only")
    }
    known = json.loads(path.read_text()) if path.is_file() else {"training": settings, "rows": {}}
    if known["training"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"--resume: expected a table of the same settings, got another in {path}. Name another folder."
        )
    meshes = options.meshes(on_shape)
    rows = known["rows"]
    for seed in range(seeds):
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
