"""Early stopping: choose the snapshot of a reward run by a held-out reward and by the distance from the
reference generator.

The choice does not use the evaluators of the reports, so the reports can evaluate its result. At each tick
two quantities are measured on held-out latents:

- the gain, which is the held-out reward of the present snapshot minus that of the snapshot that is kept so
  far, paired by latent, in standard errors of its mean;
- the density-consistency distance from the reference, mean |sigma - sigma_ref|, where sigma is the raw
  density.

A snapshot that is further from the reference than the kept snapshot replaces it if the gain is larger than
`early_stop` standard errors. A snapshot that is nearer replaces it if the mean gain is not negative. A
snapshot further away than `early_stop_distance` never replaces a snapshot within that distance. The training
itself continues to its end and is not changed.

Shapes: N latents; D, H, W grid points along z, y, x.
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
from eg3d_rlhf.generators import KEPT, as_generator, ws_of_seeds
from eg3d_rlhf.tuning.gan.heldout_metrics import HELDOUT, PREFIX, PSI
from eg3d_rlhf.tuning.gan.phase import density_l1
from eg3d_rlhf.tuning.gan.settings import EarlyStopConfig
from training import networks
from training.config import number_text
from training.networks import RENDERED, Networks


def gain_in_errors(gain: np.ndarray) -> float:
    """Return the mean of the paired differences `gain` [N], divided by the standard error of that mean.

    If all differences are equal, the standard error is 0. The result is then infinite with the sign of the
    mean, or 0 if the differences are 0.
    """
    mean = float(gain.mean())
    standard_error = float(gain.std(ddof=1) / math.sqrt(len(gain)))
    if standard_error > 0:
        return mean / standard_error
    return math.copysign(math.inf, mean) if mean else 0.0


def replaces(config: EarlyStopConfig, distance: float, kept_distance: float, gain: np.ndarray) -> bool:
    """Return True if the present snapshot replaces the kept snapshot, by the rule in the module's docstring.

    Args:
        config: settings of the rule.
        distance: density-consistency distance of the present snapshot.
        kept_distance: density-consistency distance of the kept snapshot.
        gain: [N], held-out reward of the present snapshot minus that of the kept snapshot.
    """
    max_distance = math.inf if config.early_stop_distance is None else config.early_stop_distance
    # If one of the two lies beyond the limit, the nearer snapshot wins, independently of its reward. This
    # also moves the kept snapshot towards the limit while no snapshot lies within it.
    if distance > max_distance or kept_distance > max_distance:
        return distance < kept_distance
    assert config.early_stop is not None  # an EarlyStop exists only with this setting
    has_no_loss = float(gain.mean()) >= 0
    return gain_in_errors(gain) > config.early_stop or (distance < kept_distance and has_no_loss)


@torch.no_grad()
def consistency(
    G: torch.nn.Module, G_ref: torch.nn.Module, resolution: int, seeds=MONITOR.seeds, batch: int = 8
) -> np.ndarray:
    """Return the density-consistency distance mean |sigma - sigma_ref| of every seed, [N].

    The samples have the truncation `PSI` of the held-out metrics.

    Args:
        G: tuned generator.
        G_ref: reference generator.
        resolution: number of grid points per edge of the cube on which the densities are compared.
        seeds: N seeds of latents. Each generator maps them with its own mapping network.
        batch: number of seeds that are computed together.
    """
    distances = []
    all_seeds = list(seeds)
    for batch_start in range(0, len(all_seeds), batch):
        batch_seeds = all_seeds[batch_start : batch_start + batch]
        grids = []  # raw densities [n, D, H, W] of the tuned generator and of the reference
        for generator in (as_generator(G), as_generator(G_ref)):
            ws = ws_of_seeds(generator, batch_seeds, truncation_psi=PSI)
            grids.append(generator.field(ws).density_grid(SlabSpec.from_bounds(generator.bounds, resolution)))
        sigma, sigma_ref = grids
        distances.append(density_l1(sigma, sigma_ref).double().cpu())
    return torch.cat(distances).numpy()


class EarlyStop(torch.nn.Module):
    """Copy of the networks of the snapshot that is kept so far, and the values by which it was chosen.

    The values are buffers, so the checkpoints of the run store them together with the weights.

    Args:
        nets: networks that the run trains.
        G_ref: frozen reference generator.
        config: settings of the rule.
        resolution: number of grid points per edge of the cube on which densities are compared.
        latent_count: number N of held-out latents.
    """

    # Held-out reward of the kept snapshot minus that of the untuned generator, [N].
    second: torch.Tensor
    # Density-consistency distance of the kept snapshot, a scalar.
    distance: torch.Tensor
    # Number of training images after which the kept snapshot was taken, a scalar; -1 before the first tick.
    at: torch.Tensor
    # Rendering resolution of the kept G_ema, a scalar; 0 if the network has no such resolution.
    rendered: torch.Tensor

    def __init__(
        self,
        nets: Networks,
        G_ref: torch.nn.Module,
        config: EarlyStopConfig,
        resolution: int,
        latent_count: int = MONITOR.count,
    ):
        super().__init__()
        self.config = config
        self.resolution = resolution
        # In a list, because torch registers a module that is an attribute as a submodule. Checkpoints would
        # then store the reference a second time, beside the state of the reward phase.
        self._reference = [G_ref]
        trained_networks = {"G": nets.G, "D": nets.D, "G_ema": nets.G_ema}
        self.kept = torch.nn.ModuleDict(
            {name: copy.deepcopy(net) for name, net in trained_networks.items() if net is not None}
        )
        # The names of these buffers are keys of the checkpoints, so they cannot change.
        self.register_buffer("second", torch.zeros(latent_count, dtype=torch.float64))
        self.register_buffer("distance", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("at", torch.tensor(-1))
        self.register_buffer("rendered", torch.tensor(0))
        self.requires_grad_(False)
        self.ledger: list[dict] = []  # one entry for each tick, see `_note`

    def tick(self, loop, stats: dict, heldout_change: np.ndarray) -> dict[str, str]:
        """Keep the present snapshot if the rule prefers it to the kept snapshot.

        Args:
            loop: training loop.
            stats: statistics of the tick. The distance, the gain and the kept snapshot are added to them.
            heldout_change: [N], held-out reward of the present snapshot minus that of the untuned generator,
                for the N held-out latents.
        Returns: dictionary from the name of a column of the status line to its text. "distance" is the mean
        distance from the reference. "kept" is the number of images of the kept snapshot, in thousands.
        """
        nets = loop.trained_object.nets
        distances = consistency(nets.G_ema, self._reference[0], self.resolution)
        keeps_nothing_yet = int(self.at) < 0
        gain = heldout_change - self.second.cpu().numpy()  # paired by latent, [N]
        # The first tick has no kept snapshot to compare with.
        if keeps_nothing_yet or replaces(self.config, float(distances.mean()), float(self.distance), gain):
            self._keep(nets, loop.cur_nimg, heldout_change, float(distances.mean()))
            # Written now and not at the end, so that a run that is killed later leaves its best snapshot.
            networks.save(loop.files.folder / KEPT, self.networks(nets))
        # `restore` rebuilds the ledger from these entries of stats.jsonl.
        stats[PREFIX + "distance"] = {
            "num": len(distances),
            "mean": float(distances.mean()),
            "std": float(distances.std()),
        }
        stats["EarlyStop/images"] = {"num": 1, "mean": float(self.at), "std": 0.0}
        stats["EarlyStop/gain"] = {"num": len(gain), "mean": float(gain.mean()), "std": float(gain.std())}
        self._note(loop.cur_nimg, stats)
        return {"distance": f"{distances.mean():.3f}", "kept": f"{number_text(int(self.at) / 1000)}"}

    def _keep(self, nets: Networks, cur_nimg: int, heldout_change: np.ndarray, distance: float) -> None:
        """Copy the present networks and their values into the buffers.

        Args:
            nets: networks that the run trains.
            cur_nimg: number of training images so far.
            heldout_change: [N], held-out reward of the present snapshot minus that of the untuned generator.
            distance: density-consistency distance of the present snapshot.
        """
        # All copies are made in place, so that the buffers keep their device and dtype.
        for network_name, kept_network in self.kept.items():
            kept_network.load_state_dict(getattr(nets, network_name).state_dict())
        self.at.fill_(cur_nimg)
        # Generators of other families have no rendering resolution; 0 marks this.
        self.rendered.fill_(getattr(nets.G_ema, RENDERED, 0))
        self.distance.fill_(distance)
        self.second.copy_(torch.from_numpy(heldout_change))

    def _note(self, cur_nimg: int, stats: dict) -> None:
        """Append an entry with the statistics of a tick to the ledger.

        Args:
            cur_nimg: number of training images up to the tick.
            stats: statistics of the tick, by name.
        """
        gain_stats = stats["EarlyStop/gain"]
        # The stored std divides by n. With s = std sqrt(n / (n - 1)), the standard error s / sqrt(n) is
        # std / sqrt(n - 1).
        standard_error = gain_stats["std"] / math.sqrt(max(gain_stats["num"] - 1, 1))
        self.ledger.append(
            {
                "images": cur_nimg,
                "heldout": stats[PREFIX + HELDOUT]["mean"],
                "distance": stats[PREFIX + "distance"]["mean"],
                "gain_over_kept": gain_stats["mean"],
                "gain_error": standard_error,
                "kept": int(stats["EarlyStop/images"]["mean"]),
            }
        )

    def restore(self, stats_file: Path) -> None:
        """Rebuild the ledger from the file of statistics of a resumed run.

        Args:
            stats_file: path of the run's stats.jsonl. The ledger is empty if there is no such file.
        """
        self.ledger = []
        for stats_line in stats_file.read_text().splitlines() if stats_file.exists() else []:
            stats = version_0_1.gan_stats(json.loads(stats_line))
            self._note(stats["nimg"], stats)

    def networks(self, nets: Networks) -> Networks:
        """Return the kept networks.

        Args:
            nets: networks that the run trains. The result has their other fields, such as the constructor
                arguments.
        """
        for network_name in ("G", "G_ema"):
            # The rendering resolution is not part of the state dict, so it is restored here. It is 0 for a
            # generator without one.
            if network_name in self.kept and int(self.rendered):
                setattr(self.kept[network_name], RENDERED, int(self.rendered))
        kept_networks: dict[str, Any] = dict(self.kept.items())
        return dataclasses.replace(nets, **kept_networks, cur_nimg=int(self.at))

    def record(self) -> dict:
        """Return the chosen snapshot, the rule and the ledger of all ticks, as values for JSON."""
        return {
            "images": int(self.at),
            # Number of images of the last tick, among whose predecessors and itself the snapshot was chosen.
            "of": self.ledger[-1]["images"] if self.ledger else int(self.at),
            "distance": float(self.distance),
            "heldout": float(self.second.mean()),
            "rule": dataclasses.asdict(self.config),
            "ticks": self.ledger,
        }
