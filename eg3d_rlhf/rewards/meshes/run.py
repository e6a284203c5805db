"""A whole training of RewardCS in a run folder, and the table of its arms over seeds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.rewards.meshes.dataset import OnShape
from eg3d_rlhf.rewards.meshes.train import MeshRewardTraining, MeshTraining
from training.storage import write_atomic

EVERY = 50  # steps between two states to go on from
REWARD, REPORT, TABLE = "reward.safetensors", "report.json", "table.json"
ARMS: dict[str, dict] = {
    "lambda 1": {"divergence": 1.0}, "lambda 0": {"divergence": 0.0}, "shuffled": {"shuffled": True}, "area only": {"area_only": True},
}  # fmt: skip


def run_training(options: MeshRewardTraining, out: Path, resume: bool = False, on_shape: OnShape = None) -> dict | None:
    """Train into the folder `out`: reward.safetensors with reward.json, report.json, stats.jsonl, states to go on from.

    Returns: the held-out figures; None where a signal stopped it, after which `resume` goes on.
    Raises: ValueError where there is a finished or begun run and no `resume`, or one of other settings.
    """
    if not resume and (out / "training_options.json").exists():
        raise ValueError(f"--out: expected a new folder, got a run in {out}. Name another, or add --resume.")
    if resume and not (out / "training_options.json").exists():
        raise ValueError(f"--resume: expected a run in --out, got none in {out}. Leave --resume out.")
    inputs = {} if options.data is None else {"data": options.data}
    training = MeshTraining(options, options.meshes(on_shape))
    out.mkdir(parents=True, exist_ok=True)
    with Run(out, options.to_dict(), inputs) as run:
        if resume:
            run.resume()
            if any(out.glob("checkpoint-*.safetensors")):
                training.load(*run.read())
            run.go_on(training.done, training.done // EVERY)
        else:
            run.begin()
        with run.stoppable(), run.writing():
            while training.done < options.steps and not run.stop_requested:
                means = training.run(min((training.done // EVERY + 1) * EVERY, options.steps))
                run.stats({"step": training.done, **means})
                run.status({"step": training.done}, training.done, options.steps, "step", {k: f"{v:.4f}" for k, v in means.items()})
                run.checkpoint(training.done, *training.state())
            if training.done < options.steps:
                return None
            reward = training.finished()
            reward.save(out / REWARD)
            run.write(REPORT, reward.provenance)
    return reward.provenance["held_out"]


def run_table(options: MeshRewardTraining, out: Path, seeds: int, on_shape: OnShape = None, say: Callable[[str], object] = print) -> dict:
    """Every arm of ARMS with seeds 0.. on the same meshes; arms that table.json in `out` holds already are not trained again.

    Returns: {"training": settings, "rows": {"arm/seed": held-out figures}, "summary": see `summary`}.
    Raises: ValueError where table.json is of other settings.
    """
    path, settings = out / TABLE, {k: v for k, v in options.to_dict().items() if k not in ("seed", "divergence", "shuffled", "area_only")}
    known = json.loads(path.read_text()) if path.is_file() else {"training": settings, "rows": {}}
    if known["training"] != json.loads(json.dumps(settings)):
        raise ValueError(f"--out: expected a table of the same settings, got another in {path}. Name another folder.")
    meshes, rows = options.meshes(on_shape), known["rows"]
    for seed in range(seeds):
        for arm, changes in ARMS.items():
            if f"{arm}/{seed}" not in rows:
                training = MeshTraining(replace(options, seed=seed, **changes), meshes)
                training.run(options.steps)
                rows[f"{arm}/{seed}"] = found = training.report()
                say(f"seed {seed}  {arm:9s}  AUC {found['auc']:.3f}  D {found['divergence']:.3f}")
                write_atomic(path, (json.dumps({"training": settings, "rows": rows}, indent=1) + "\n").encode())
    return {"training": settings, "rows": rows, "summary": summary(rows)}


def summary(rows: dict[str, dict]) -> dict[str, dict]:
    """Of each arm over its seeds: mean and range of AUC, mean D at its own width and at one that arms share, mean AUC of each defect."""
    found = {}
    for arm in ARMS:
        own = [row for name, row in rows.items() if name.split("/")[0] == arm]
        if own:
            scores = [row["auc"] for row in own]
            kinds = {kind: float(np.mean([row["auc_by_kind"][kind] for row in own])) for kind in own[0]["auc_by_kind"]}
            found[arm] = {"n": len(own), "auc": float(np.mean(scores)), "auc_range": [min(scores), max(scores)],
                          **{name: float(np.mean([row[name] for row in own])) for name in ("divergence", "divergence_fixed")},
                          "auc_by_kind": kinds}  # fmt: skip
    return found
