"""Learning curves of a reward: collect -> JSON -> figure. The figure reads the JSON alone."""

import json
from collections.abc import Sequence
from pathlib import Path

from training.storage import write_atomic


def collect_curves(history: Sequence[dict], best_epoch: int, context: dict) -> dict:
    """One series per quantity over epochs. `context` is stated under the figure: n, seed, preset, generator."""
    return {
        "epoch": [r["epoch"] + 1 for r in history],
        "train_accuracy": [r["train_accuracy"] for r in history],
        "val_accuracy": [r["val_accuracy"] for r in history],
        "val_log_loss": [r["val_log_loss"] for r in history],
        "loss": {name: [r["loss"][name] for r in history] for name in history[0]["loss"]},
        "best_epoch": best_epoch + 1,
        "context": context,
    }


def write_curves(path: Path, curves: dict) -> Path:
    """Write the curves as JSON, atomically."""
    write_atomic(path, (json.dumps(curves, indent=1) + "\n").encode())
    return path


def plot_curves(json_path: Path, png_path: Path) -> Path:
    """Draw the JSON of `write_curves`: accuracies on the left, validation log loss and weighted loss terms on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = json.loads(json_path.read_text())
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(curves["epoch"], curves["train_accuracy"], label="training pairs (while training)")
    left.plot(curves["epoch"], curves["val_accuracy"], label="validation pairs")
    left.axvline(curves["best_epoch"], color="0.6", linestyle=":", label="chosen epoch")
    left.set(xlabel="epoch", ylabel="pairs ordered as labelled (fraction)")
    left.legend()
    right.plot(curves["epoch"], curves["val_log_loss"], label="validation log loss")
    for name, values in curves["loss"].items():
        right.plot(curves["epoch"], values, label=f"training {name}, weighted", linewidth=1)
    right.set(xlabel="epoch", ylabel="loss (nats)", yscale="log")
    right.legend(fontsize=8)
    figure.suptitle(", ".join(f"{k} {v}" for k, v in curves["context"].items()), fontsize=9)
    figure.savefig(png_path, dpi=120)
    return png_path
