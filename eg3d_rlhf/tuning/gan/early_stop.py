"""Early stopping: choose the snapshot of a reward run by a held-out reward and by the distance from the
reference.

No evaluator of the reports takes part in the choice. At each tick two quantities are measured on held-out
latents: the held-out reward's paired gain over the snapshot that is kept so far, in standard errors, and the
density-consistency distance mean |sigma - sigma_ref|.

A snapshot that is further away replaces the kept one if its gain is larger than `early_stop` standard errors.
A nearer one replaces it if there is no loss. A snapshot further away than `early_stop_distance` never
replaces one within that distance. The training itself continues to its end and is not changed.

Letters: N latents; D, H, W grid points along z, y, x.
"""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.seeds import MONITOR
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.generators import KEPT, of, ws_of_seeds
from eg3d_rlhf.tuning.gan.heldout_metrics import HELDOUT, PREFIX, PSI
from eg3d_rlhf.tuning.gan.phase import density_l1
from eg3d_rlhf.tuning.gan.settings import EarlyStopConfig
from training import networks
from training.networks import RENDERED, Networks


def gain_in_errors(gain: np.ndarray) -> float:
    """Return the mean of paired differences [N] in standard errors.

    It is infinite if all differences are equal and not 0.
    """
    mean = float(gain.mean())
    # All differences may be equal; then there is no standard error to divide by.
    error = float(gain.std(ddof=1) / math.sqrt(len(gain)))  # standard error of the mean
    if error > 0:
        return mean / error
    return math.copysign(math.inf, mean) if mean else 0.0


def replaces(config: EarlyStopConfig, distance: float, kept: float, gain: np.ndarray) -> bool:
    """Return whether a snapshot replaces the kept one; see the module.

    Args:
        distance: density-consistency distance of the snapshot.
        kept: distance of the kept one.
        gain: [N], held-out reward of the snapshot less that of the kept one.
    """
    limit = math.inf if config.early_stop_distance is None else config.early_stop_distance
    # Beyond the limit only nearer counts, until a snapshot lies within it.
    if distance > limit or kept > limit:
        return distance < kept
    assert config.early_stop is not None  # an EarlyStop exists only with this setting
    return gain_in_errors(gain) > config.early_stop or (distance < kept and float(gain.mean()) >= 0)


@torch.no_grad()
def consistency(
    G: torch.nn.Module, G_ref: torch.nn.Module, resolution: int, seeds=MONITOR.all, batch: int = 8
) -> np.ndarray:
    """Return the density-consistency distances [N] of seeds, at the truncation of the held-out metrics.

    Args:
        resolution: grid points per edge of the whole cube.
        batch: seeds that are computed together.
    """
    distances = []
    for part in (list(seeds)[i : i + batch] for i in range(0, len(seeds), batch)):
        sigma, sigma_ref = (
            g.field(ws_of_seeds(g, part, truncation_psi=PSI)).density_grid(SlabSpec.of(g.bounds, resolution))
            for g in (of(G), of(G_ref))  # each maps the seeds by its own mapping network
        )
        distances.append(density_l1(sigma, sigma_ref).double().cpu())
    return torch.cat(distances).numpy()


class EarlyStop(torch.nn.Module):
    """The kept networks and the values by which they were chosen.

    All of them are tensors, which the run's checkpoints store.

    Args:
        nets: networks that are trained.
        G_ref: the frozen reference.
        config: settings of the rule.
        resolution: grid points per edge of the cubes whose distance is measured.
        latents: number of held-out latents.
    """

    second: torch.Tensor  # [N], change of the held-out reward of the kept snapshot
    distance: torch.Tensor  # [], density-consistency distance of the kept snapshot
    at: torch.Tensor  # [], images after which the kept snapshot was taken; -1: nothing is kept yet
    rendered: torch.Tensor  # [], rendering resolution of the kept G

    def __init__(
        self,
        nets: Networks,
        G_ref: torch.nn.Module,
        config: EarlyStopConfig,
        resolution: int,
        latents: int = MONITOR.count,
    ):
        super().__init__()
        self.config = config
        self.resolution = resolution
        # In a list, so that torch does not register it as a
        # submodule: the reward phase's state stores it already.
        self._reference = [G_ref]
        parts = {"G": nets.G, "D": nets.D, "G_ema": nets.G_ema}
        self.kept = torch.nn.ModuleDict(
            {name: copy.deepcopy(part) for name, part in parts.items() if part is not None}
        )
        # Buffers get into checkpoints; their names are part of that format.
        self.register_buffer("second", torch.zeros(latents, dtype=torch.float64))
        self.register_buffer("distance", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("at", torch.tensor(-1))
        self.register_buffer("rendered", torch.tensor(0))
        self.requires_grad_(False)
        self.ledger: list[dict] = []  # one entry per tick

    def tick(self, loop, stats: dict, second: np.ndarray) -> dict[str, str]:
        """Choose between the kept snapshot and the present one.

        Args:
            loop: training loop.
            stats: statistics of the tick, to which those of the choice are added.
            second: [N], changes of the held-out reward since the untuned generator, on the held-out latents.
        Returns: a field for the status line.
        """
        nets = loop.subject.nets
        distances = consistency(nets.G_ema, self._reference[0], self.resolution)
        first = int(self.at) < 0  # nothing is kept yet
        gain = second - self.second.cpu().numpy()  # paired by latent, [N]
        # The first tick always keeps its snapshot: there is no other.
        if first or replaces(self.config, float(distances.mean()), float(self.distance), gain):
            self._keep(nets, loop.cur_nimg, second, float(distances.mean()))
            # Written at once: a run that is killed later leaves its best snapshot as a file.
            networks.save(loop.files.folder / KEPT, self.networks(nets))
        # Added to the statistics, so that `restore` can rebuild the ledger from stats.jsonl.
        stats[PREFIX + "distance"] = {
            "num": len(distances),
            "mean": float(distances.mean()),
            "std": float(distances.std()),
        }
        stats["EarlyStop/images"] = {"num": 1, "mean": float(self.at), "std": 0.0}
        stats["EarlyStop/gain"] = {"num": len(gain), "mean": float(gain.mean()), "std": float(gain.std())}
        self._note(loop.cur_nimg, stats)
        return {"distance": f"{distances.mean():.3f}", "kept": f"{int(self.at) / 1000:g}"}

    def _keep(self, nets: Networks, cur_nimg: int, second: np.ndarray, distance: float) -> None:
        """Copy the present networks and values in place, so that buffers keep their device."""
        for name, part in self.kept.items():
            part.load_state_dict(getattr(nets, name).state_dict())
        self.at.fill_(cur_nimg)
        # 0 for networks without a rendering resolution, such as those of other families.
        self.rendered.fill_(getattr(nets.G_ema, RENDERED, 0))
        self.distance.fill_(distance)
        self.second.copy_(torch.from_numpy(second))

    def _note(self, cur_nimg: int, stats: dict) -> None:
        """Append a tick to the ledger."""
        gain = stats["EarlyStop/gain"]
        # `std` is the biased one, hence the division by n - 1 for the standard error.
        error = gain["std"] / math.sqrt(max(gain["num"] - 1, 1))
        self.ledger.append(
            {
                "images": cur_nimg,
                "heldout": stats[PREFIX + HELDOUT]["mean"],
                "distance": stats[PREFIX + "distance"]["mean"],
                "gain_over_kept": gain["mean"],
                "gain_error": error,
                "kept": int(stats["EarlyStop/images"]["mean"]),
            }
        )

    def restore(self, stats_file: Path) -> None:
        """Rebuild the ledger from the run's statistics after a resume."""
        self.ledger = []
        for line in stats_file.read_text().splitlines() if stats_file.exists() else []:
            stats = version_0_1.gan_stats(json.loads(line))
            self._note(stats["nimg"], stats)

    def networks(self, nets: Networks) -> Networks:
        """Return the kept networks, with the description of those that are trained."""
        for name in ("G", "G_ema"):
            if name in self.kept and int(self.rendered):
                setattr(self.kept[name], RENDERED, int(self.rendered))
        # The kept modules in place of the trained ones; constructor arguments are the same.
        parts: dict[str, Any] = dict(self.kept.items())
        return dataclasses.replace(nets, **parts, cur_nimg=int(self.at))

    def record(self) -> dict:
        """Return the choice and all ticks, as JSON."""
        return {
            "images": int(self.at),
            # Images of the last tick, of which the choice was made.
            "of": self.ledger[-1]["images"] if self.ledger else int(self.at),
            "distance": float(self.distance),
            "heldout": float(self.second.mean()),
            "rule": dataclasses.asdict(self.config),
            "ticks": self.ledger,
        }
