"""Early stop: a reward run keeps the snapshot that a second reward and the distance from the reference
choose; no judge is asked.

At each tick, on the monitor's latents: the second reward's paired gain over the snapshot that is kept so far,
in standard errors, and the density-consistency distance mean |sigma - sigma_ref|. The burden of proof is on
what went further away: such a snapshot takes the place of the kept one where its gain is larger than
`early_stop` standard errors, a nearer one where there is no loss. A snapshot further away than
`early_stop_distance` never takes the place of one within it. Training itself goes on to its end, unchanged.

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
    """Mean of paired differences [N] in standard errors; infinite where they are all alike and not 0."""
    mean = float(gain.mean())
    error = float(gain.std(ddof=1) / math.sqrt(len(gain)))
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


def replaces(config: EarlyStopConfig, distance: float, kept: float, gain: np.ndarray) -> bool:
    """Whether a snapshot at `distance` takes the place of one at `kept`, over which the second reward gains
    [N]; see the module.
    """
    limit = math.inf if config.early_stop_distance is None else config.early_stop_distance
    if distance > limit or kept > limit:
        return distance < kept
    assert config.early_stop is not None
    return gain_in_errors(gain) > config.early_stop or (distance < kept and float(gain.mean()) >= 0)


@torch.no_grad()
def consistency(
    G: torch.nn.Module, G_ref: torch.nn.Module, resolution: int, seeds=MONITOR.all, batch: int = 8
) -> np.ndarray:
    """Density-consistency distance [N] of seeds at the monitor's truncation, on a grid of `resolution` points
    per edge of the whole cube.
    """
    distances = []
    for part in (list(seeds)[i : i + batch] for i in range(0, len(seeds), batch)):
        here, there = (
            g.field(ws_of_seeds(g, part, truncation_psi=PSI)).density_grid(SlabSpec.of(g.bounds, resolution))
            for g in (of(G), of(G_ref))
        )
        distances.append(density_l1(here, there).double().cpu())
    return torch.cat(distances).numpy()


class EarlyStop(torch.nn.Module):
    """The kept networks and what chose them: all of it tensors, which the run's checkpoints carry.

    Args:
        nets: that are trained; G_ref: the frozen reference; resolution: of the cubes whose distance is taken;
            latents: of the monitor.
    """

    second: torch.Tensor  # [N] changes of the held-out reward; checkpoints have this name
    distance: torch.Tensor
    at: torch.Tensor  # images; -1: nothing is kept yet
    rendered: torch.Tensor  # resolution that the kept G renders

    def __init__(
        self,
        nets: Networks,
        G_ref: torch.nn.Module,
        config: EarlyStopConfig,
        resolution: int,
        latents: int = MONITOR.count,
    ):
        super().__init__()
        # a list hides it: it has its place in the checkpoint
        self.config = config
        self.resolution = resolution
        self._reference = [G_ref]
        parts = {"G": nets.G, "D": nets.D, "G_ema": nets.G_ema}
        self.kept = torch.nn.ModuleDict(
            {name: copy.deepcopy(part) for name, part in parts.items() if part is not None}
        )
        self.register_buffer("second", torch.zeros(latents, dtype=torch.float64))
        self.register_buffer("distance", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("at", torch.tensor(-1))
        self.register_buffer("rendered", torch.tensor(0))
        self.requires_grad_(False)
        self.ledger: list[dict] = []  # one entry per tick

    def tick(self, loop, stats: dict, second: np.ndarray) -> dict[str, str]:
        """Choose between the kept snapshot and the present one; adds to the statistics, returns a field for
        the status line.

        Args: second [N]: the second reward's changes since the untuned generator, on the monitor's latents.
        """
        nets = loop.subject.nets
        distances = consistency(nets.G_ema, self._reference[0], self.resolution)
        first = int(self.at) < 0
        gain = second - self.second.cpu().numpy()
        if first or replaces(self.config, float(distances.mean()), float(self.distance), gain):
            self._keep(nets, loop.cur_nimg, second, float(distances.mean()))
            networks.save(loop.files.folder / KEPT, self.networks(nets))
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
        for name, part in self.kept.items():
            part.load_state_dict(getattr(nets, name).state_dict())
        self.at.fill_(cur_nimg)
        self.rendered.fill_(getattr(nets.G_ema, RENDERED, 0))
        self.distance.fill_(distance)
        self.second.copy_(torch.from_numpy(second))

    def _note(self, cur_nimg: int, stats: dict) -> None:
        gain = stats["EarlyStop/gain"]
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
        self.ledger = []
        for line in stats_file.read_text().splitlines() if stats_file.exists() else []:
            stats = version_0_1.gan_stats(json.loads(line))
            self._note(stats["nimg"], stats)

    def networks(self, nets: Networks) -> Networks:
        for name in ("G", "G_ema"):
            if name in self.kept and int(self.rendered):
                setattr(self.kept[name], RENDERED, int(self.rendered))
        parts: dict[str, Any] = dict(self.kept.items())
        return dataclasses.replace(nets, **parts, cur_nimg=int(self.at))

    def record(self) -> dict:
        return {
            "images": int(self.at),
            "of": self.ledger[-1]["images"] if self.ledger else int(self.at),
            "distance": float(self.distance),
            "heldout": float(self.second.mean()),
            "rule": dataclasses.asdict(self.config),
            "ticks": self.ledger,
        }
