"""The loop: assets that are optimised together against a prior, under one method; resumable bit for bit.

    render -> encode -> time and noise -> guidance's gradient -> asset's parameters

Letters: A assets, V views of each, B = A * V pictures, K noises. Everything that is drawn comes from `Streams` by (seed, stream, step).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.render import Pictures, Renderer
from eg3d_rlhf.generators.assets.views import FINISHED, Views, evenly_around
from eg3d_rlhf.tuning.distill.config import LoopConfig
from eg3d_rlhf.tuning.distill.guidance.best_of_n import BestOfN
from eg3d_rlhf.tuning.distill.guidance.geometry import ProgressiveGeometry
from eg3d_rlhf.tuning.distill.progress import Tick
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from eg3d_rlhf.tuning.distill.streams import Streams
from eg3d_rlhf.tuning.distill.target import distillation_loss
from training import checkpoint
from training.phases import LossNotFiniteError

DRIFT_TIME = 500  # at which the drift from the prior is measured


class StoppedError(Exception):
    """SIGTERM or SIGINT arrived; the state of that moment is on the disk."""


@dataclass(kw_only=True)
class Distillation:
    """Assets under one method. `step` goes one step on; `state` and `load` carry everything that changes."""

    asset: Asset
    prompts: list[str]  # A
    prior: DiffusionPrior
    renderer: Renderer
    guidance: Guidance
    config: LoopConfig
    streams: Streams
    background: torch.Tensor | None = None  # [3] in 0..1; None: a colour of its own for each asset and step
    geometry: ProgressiveGeometry | None = None
    log_prob: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None  # of latents [B, C, H, W], where the prior knows it: [B]
    optimizer: torch.optim.Optimizer = field(init=False)
    tick: Tick = field(init=False)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.asset):
            raise ValueError(f"Distillation: expected {len(self.asset)} prompts, one for each asset, got {len(self.prompts)}. Give those.")
        self.rates = {"grid": self.config.lr, "decoder": self.config.decoder_lr}
        groups = [{"params": parameters, "lr": self.rates[name], "name": name} for name, parameters in self.asset.groups().items()]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.tick = Tick()

    # One step.

    def step(self, step: int) -> None:
        """Move every asset by one step and note its figures."""
        views, pictures = self.look("views", step)
        x = self.prior.encode(pictures.images)
        per_asset = len(x) // len(self.asset)
        t = self.config.window.draw(step, len(self.asset), per_asset, self.streams.generator("t", step), shared=self.config.shared_time)
        prompts = [prompt for prompt in self.prompts for _ in range(per_asset)]
        output = self.guidance(x, t.to(x.device), prompts, views.cameras[:, :16].to(x.device), step, pictures.images)
        if not bool(torch.isfinite(output.grad).all()):
            raise LossNotFiniteError(f"--prior: expected finite predictions, got NaN or infinity at step {step}. Lower --guidance-scale.")
        loss = distillation_loss(x, output, images=pictures.images, clamp=self.config.grad_clamp)
        figures = {"opacity": float(pictures.opacity.detach().mean()), "grad": float(output.grad.norm())}
        for name, weight in self.config.penalties(step).items():
            loss = loss + weight * self.asset.regularisers()[name].mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * (1 - (1 - self.config.lr_end) * step / self.config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.geometry is not None:
            output.terms |= self.geometry.add(self.asset, list(self.asset.parameters()), self.prompts, step)
        self.optimizer.step()
        self.tick.add(output, figures, pictures.images)

    def look(self, stream: str, step: int) -> tuple[Views, Pictures]:
        """What the prior is shown of the assets."""
        views = self.renderer.draw(len(self.asset), self.streams.generator(stream, step))
        below = self.background
        if below is None:
            drawn = torch.rand(len(self.asset), 3, generator=self.streams.generator("background", step))
            below = drawn.repeat_interleave(len(views.cameras) // len(self.asset), dim=0)
        return views, self.renderer.render(self.asset, views, below)

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """How well the prior knows what it sees: log density where it has one, else the error of its prediction of a fixed noise."""
        views, pictures = self.look("drift", 0)
        x = self.prior.encode(pictures.images)
        prompts = [prompt for prompt in self.prompts for _ in range(len(x) // len(self.asset))]
        if self.log_prob is not None:
            return {"log_prob": float(self.log_prob(x, prompts).median())}
        schedule, t = NoiseSchedule(self.prior.alphas_cumprod), torch.full((len(x),), DRIFT_TIME, device=x.device)
        noise = self.streams.noises(1, x, -1)[0]
        seen = self.prior.predict_noise(schedule.mix(x, noise, t), t, self.prior.embed(prompts), views.cameras[:, :16].to(x))
        return {"prior_error": float((seen - noise).square().mean())}

    @torch.no_grad()
    def finished(self) -> Asset:
        """What a run keeps: all assets, or of several starts the best. They are seen from the same sides, on white or their background."""
        if not isinstance(self.guidance, BestOfN):
            return self.asset
        views = evenly_around(len(self.asset), self.guidance.denoiser.views, **FINISHED)
        seen = self.renderer.render(self.asset, views, torch.ones(3) if self.background is None else self.background)
        prompts = [prompt for prompt in self.prompts for _ in range(self.guidance.denoiser.views)]
        return self.asset.pick(self.guidance.best(seen.images, prompts, views.cameras[:, :16].to(seen.images)))

    # States.

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Everything that changes, as tensors and JSON."""
        tensors = {f"asset.{name}": value for name, value in self.asset.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors("optim", self.optimizer)
        for name, part in self._stateful().items():
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        return tensors, {"tick": self.tick.state()}

    def load(self, tensors: Mapping[str, torch.Tensor], meta: Mapping) -> None:
        """Inverse of `state`."""
        names = ("asset", *self._stateful())
        own = {name: {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")} for name in names}
        self.asset.load_state_dict(own["asset"])
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        for name, part in self._stateful().items():
            part.load_state_dict(own[name])
        self.tick.load(meta["tick"])

    def _stateful(self) -> dict:
        parts = {"guidance": self.guidance, "geometry": self.geometry, "scores": self.tick.scores}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
