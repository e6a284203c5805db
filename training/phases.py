"""What the loop runs: phases, each an optimisation step on one network, and the optimisers of EG3D's four."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import torch

from training.config import LoopConfig, OptimizerConfig
from training.gan_phases import Batch, GanPhases, Loss


@dataclasses.dataclass(kw_only=True)
class Phase:
    """One optimisation step on one network, every `interval` iterations, with its loss scaled by `gain`."""

    name: str
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[Batch], Iterator[Loss]]
    interval: int = 1
    gain: float = 1.0
    state: torch.nn.Module | None = None  # what the phase itself must carry through a checkpoint
    own_optimizer: bool = False  # saved apart from the network's GAN optimizer


def lazy_adam(module: torch.nn.Module, config: OptimizerConfig, interval: int | None) -> torch.optim.Adam:
    """Adam corrected for lazy regularisation (Karras et al. 2020, appendix B): with r = I/(I+1), lr*r and betas**r.

    Args:
        interval: iterations between regularisations, or None for no correction.
    """
    r = interval / (interval + 1) if interval else 1.0
    parameters = list(module.parameters())
    return torch.optim.Adam(parameters, lr=config.lr * r, betas=(config.beta1**r, config.beta2**r), eps=config.eps)


def gan_phases(terms: GanPhases, G_opt: OptimizerConfig, D_opt: OptimizerConfig, config: LoopConfig) -> list[Phase]:
    """Gmain, Greg, Dmain, Dreg; without density regularisation there is no Greg and no correction of G's optimizer."""
    g_interval = config.g_reg_interval if terms.config.density_reg > 0 else None
    G_adam = lazy_adam(terms.G, G_opt, g_interval)
    D_adam = lazy_adam(terms.D, D_opt, config.d_reg_interval)
    phases = [Phase(name="Gmain" if g_interval else "Gboth", module=terms.G, optimizer=G_adam, losses=terms.g_main)]
    if g_interval:
        phases.append(Phase(name="Greg", module=terms.G, optimizer=G_adam, losses=terms.g_reg, interval=g_interval, gain=g_interval))
    interval = config.d_reg_interval
    phases.append(Phase(name="Dmain", module=terms.D, optimizer=D_adam, losses=terms.d_main))
    phases.append(Phase(name="Dreg", module=terms.D, optimizer=D_adam, losses=terms.d_reg, interval=interval, gain=interval))
    return phases


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any printable values."""
    digest = hashlib.sha256("/".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LossNotFiniteError(ValueError):
    """A loss became NaN or infinite; the message names the phase, the iteration and the last good checkpoint."""
