"""How far images of the same latent have moved: PSNR, SSIM, LPIPS and identity, beside the difference between latents as a scale.

Letters: N latents, R pixels.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.texts import BOOTSTRAP, NO_CONTROL, absent_job, span
from eg3d_rlhf.generators import LoadedGenerator, camera
from eg3d_rlhf.metrics.image_similarity import load_identity, load_lpips, psnr, ssim
from eg3d_rlhf.metrics.statistics import bootstrap_mean_interval
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Facts, Finding, Job, identity_of_file

YAW = 0.3  # radians from frontal: a view that shows the shape
NO_LPIPS = "LPIPS is left out: no weights are bundled. Name them with --lpips=FILE, a TorchScript file that is called as f(a, b)."
NO_IDENTITY = (
    "Identity drift is left out: it needs a network that embeds faces, and none is bundled. Name one with --identity=FILE, a TorchScript "
    "file that maps images [N, 3, H, W] in [-1, 1] to embeddings [N, F]."
)
Pairwise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def jobs(c: Comparison) -> list[Job]:
    """Appearance drift, and identity drift where a network is named."""
    appearance = Job(
        key="appearance-drift", title="Do images of the same latent look the same?", compute=partial(appearance_drift, c),
        plots={"similarity": plot_similarity}, inputs=c.inputs("before", "after", "control", n=c.n, lpips=identity_of_file(c.lpips)),
    )
    title = "Does a latent keep its identity?"
    if c.identity is None:
        return [appearance, absent_job(c, "identity-drift", title, NO_IDENTITY)]
    return [appearance, Job(
        key="identity-drift", title=title, compute=partial(identity_drift, c), plots={"similarity": plot_similarity},
        inputs=c.inputs("before", "after", "control", n=c.n, identity=identity_of_file(c.identity)),
    )]


@torch.no_grad()
def renderings(c: Comparison, generator: LoadedGenerator, seeds: range, yaw: float) -> torch.Tensor:
    """Images [N, 3, R, R] on the CPU, with constant noise and the same ray jitter in every call."""
    parts = []
    for start, ws in zip(range(0, len(seeds), c.batch), c.ws(generator, seeds).split(c.batch), strict=True):
        with torch.random.fork_rng(devices=[c.device] if c.device.type == "cuda" else []):
            torch.manual_seed(seeds[start])
            images = generator.G.synthesis(ws, camera(generator.G, yaw=yaw, n=len(ws)), noise_mode="const")["image"]
        parts.append(images.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def _in_batches(c: Comparison, measure: Pairwise, first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    pairs = zip(first.split(c.batch), second.split(c.batch), strict=True)
    return torch.cat([measure(a.to(c.device), b.to(c.device)).cpu() for a, b in pairs]).double().numpy()


def _finding(c: Comparison, measures: dict[str, Pairwise], yaw: float) -> tuple[dict, list[dict], Facts]:
    """Values per measure and pair of networks: data, rows, facts. 'other latent' pairs each image before with the next latent's."""
    seeds = c.seeds()
    images = {role: renderings(c, generator, seeds, yaw) for role, generator in c.generators().items()}
    images["other latent"] = images["before"].roll(1, 0)
    data = {
        name: {role: _in_batches(c, measure, images["before"], other).tolist() for role, other in images.items() if role != "before"}
        for name, measure in measures.items()
    }
    rows = [
        {"measure": name, "against": role, **bootstrap_mean_interval(values)._asdict()} for name, roles in data.items()
        for role, values in roles.items()
    ]
    return {"measures": data, "rows": rows}, rows, c.facts(seeds, ("before", "after", "control"), BOOTSTRAP)


def _says(rows: list[dict]) -> list[str]:
    says = []
    for name in dict.fromkeys(row["measure"] for row in rows):
        found = {row["against"]: span(row["mean"], row["lo"], row["hi"], ".3f") for row in rows if row["measure"] == name}
        beside = f"; control {found['control']}" if "control" in found else ""
        says.append(f"{name}, before against after: {found['after']}{beside}; against another latent {found['other latent']}.")
    return says


def appearance_drift(c: Comparison, folder: Path) -> Finding:
    """PSNR, SSIM and, where weights are named, LPIPS between images of the same latent before and after."""
    del folder
    measures: dict[str, Pairwise] = {"PSNR, dB": psnr, "SSIM": ssim}
    if c.lpips is not None:
        measures["LPIPS"] = load_lpips(c.lpips, c.device)
    data, rows, facts = _finding(c, measures, YAW)
    control = [] if c.control is not None else [NO_CONTROL]
    meaning = (
        "Drift is change, not harm: a better shape has to look different. The control says how much goes on without the reward; another "
        "latent says what no likeness at all looks like."
    )
    return Finding(facts=facts, data=data, rows=rows, says=[*_says(rows), meaning, *([NO_LPIPS] if c.lpips is None else []), *control])


def identity_drift(c: Comparison, folder: Path) -> Finding:
    """Cosine similarity of the named network's embeddings, frontal view."""
    del folder
    embed = load_identity(c.identity, c.device)
    data, rows, facts = _finding(c, {"cosine similarity": lambda a, b: (embed(a) * embed(b)).sum(dim=1)}, 0.0)
    meaning = "What counts as identity is what this network was trained to tell apart; outside its domain the figure means little."
    return Finding(facts=facts, data=data, rows=rows, says=[*_says(rows), meaning])


def plot_similarity(data: dict):
    """Distribution of each measure per pair of networks."""
    drawn, axes = style.figure(columns=len(data["measures"]))
    for axis, (name, roles) in zip(np.atleast_1d(axes), data["measures"].items(), strict=True):
        parts = axis.violinplot(list(roles.values()), showextrema=False)
        for i, (body, role) in enumerate(zip(parts["bodies"], roles, strict=True)):
            body.set_facecolor(style.colour(role))
            body.set_alpha(0.5)
            row = next(r for r in data["rows"] if r["measure"] == name and r["against"] == role)
            error = [[max(0.0, row["mean"] - row["lo"])], [max(0.0, row["hi"] - row["mean"])]]
            axis.errorbar([i + 1], [row["mean"]], yerr=error, fmt="o", capsize=4, markersize=4, color=style.colour(role))
        axis.set_xticks(range(1, len(roles) + 1), list(roles))
        axis.set(ylabel=name, title=f"{name}, against before")
    return drawn
