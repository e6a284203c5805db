"""The loop: assets that are optimised together against a prior, under one method; resumable bit for bit.

    render -> encode -> time and noise -> guidance's gradient -> asset's parameters

Letters: A assets, V views of each, B = A * V pictures, K noises. Everything that is drawn comes from
`Streams` by (seed, stream, step).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance, GuidanceOutput
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import FINISHED, Pictures, Renderer, Views, evenly_around
from eg3d_rlhf.models.weights import below
from eg3d_rlhf.tuning.distill.config import LoopConfig, ramp_of
from eg3d_rlhf.tuning.distill.gradients import History, distillation_loss
from eg3d_rlhf.tuning.distill.guidance.geometry import ProgressiveGeometry
from eg3d_rlhf.tuning.distill.guidance.sds import BestOfN
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, Streams, draw_times
from training import checkpoint
from training.phases import LossNotFiniteError

# What a run of score distillation says of itself: the figures of a tick, and the signs of known failures. A
# tick is a number of steps; its figures are means over them.

WINDOW = 200  # last scores whose range new ones are held against
_SHARES = (0.1, 0.5, 0.9)  # quantiles of the gap
_DIFFER = 0.02  # share of a line's value that counts as a change


class Tick:
    """Sums the figures of the steps since the last line."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.scores = History(WINDOW)

    def add(self, output: GuidanceOutput, figures: Mapping[str, float], images: torch.Tensor) -> None:
        """Note one step. Args: images: rendered pictures, which should lie in 0..1."""
        for name, value in figures.items():
            self._note(name, float(value))
        for name, values in output.terms.items():
            self._note(name, *values.detach().flatten().tolist())
        self._note("image_low", float(images.detach().min()))
        self._note("image_high", float(images.detach().max()))
        if output.scores is not None:
            scores = output.scores.detach().float().cpu()  # [K, A]
            if self.scores.rows.numel():
                low = self.scores.rows.min()
                high = self.scores.rows.max()
                self._note(
                    "scores_out_of_range", *((scores < low) | (scores > high)).float().flatten().tolist()
                )
            self.scores.add(scores)
            self._note("reward", *scores.flatten().tolist())
            self._note("gap", *(scores.amax(0) - scores.amin(0)).tolist())
        if output.winner is not None:
            decided = output.winner[output.winner >= 0]
            self._note("first_wins", *(decided == 0).float().tolist())
            self._note("unanswered", *(output.winner < 0).float().tolist())
        if output.one_sided is not None:
            self._note("one_sided", *output.one_sided.float().tolist())

    def _note(self, name: str, *values: float) -> None:
        self.values.setdefault(name, []).extend(values)

    def line(self, step: int, drift: Mapping[str, float]) -> dict[str, float]:
        """The record of the tick that ends after `step` steps; the next one begins."""
        record: dict[str, float] = {"step": step, **drift}
        for name, values in sorted(self.values.items()):
            if not values:
                continue
            tensor = torch.tensor(values, dtype=torch.float64)
            if name == "gap":
                record |= {f"gap_{int(100 * share)}": float(tensor.quantile(share)) for share in _SHARES}
            else:
                record[name] = float(
                    {"image_low": tensor.min, "image_high": tensor.max}.get(name, tensor.mean)()
                )
        self.values = {}
        return record


def signs(lines: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Signs of known failures in the newest line, by name, each with its remedy."""
    last = lines[-1]
    warnings = {}
    if last.get("one_sided") == 1:
        warnings["gaps"] = (
            "every gap lies below --tau: losers push nothing away. Lower tau, or use --set tau_mode=quantile."
        )
    if last.get("gap_90") == 0:
        warnings["flat"] = (
            "all noises got the same reward: there is no preference to follow. Check the reward, or give it"
            " larger pictures."
        )
    if last.get("first_wins") in (0, 1):
        warnings["winner"] = (
            f"the first noise won {last['first_wins']:.0%} of the pairs: a judge that looks at places."
            " Shuffle its order."
        )
    if last.get("unanswered", 0) > 0.5:
        warnings["unanswered"] = (
            f"{last['unanswered']:.0%} of the pairs had no answer: those steps only pull. Check the judge."
        )
    if last.get("image_low", 0) < -0.01 or last.get("image_high", 1) > 1.01:
        reach = f"{last['image_low']:.2f} to {last['image_high']:.2f}"
        warnings["range"] = f"pictures reach {reach}, expected 0 to 1: priors and rewards misread them."
    if len(lines) >= 4 and "reward" in last:
        then = lines[-4]
        away = [
            then[n] - last[n] if n == "log_prob" else last[n] - then[n]
            for n in ("log_prob", "prior_error")
            if n in last
        ]
        size = max((abs(then[n]) for n in ("log_prob", "prior_error") if n in last), default=1.0)
        if away and away[0] > _DIFFER * max(size, 1e-9) and last["reward"] > then["reward"]:
            warnings["drift"] = (
                "the reward rises while the prior knows the pictures less: the reward is being exploited."
                " Lower its weight."
            )
    return warnings


def shown(record: Mapping[str, float], steps: int) -> dict[str, str]:
    columns = {
        "first_wins": "5.2f",
        "gap_50": "8.2g",
        "one_sided": "4.2f",
        "cosine": "5.2f",
        "reward": "8.3g",
        "log_prob": "8.3g",
        "prior_error": "6.3f",
        "opacity": "4.2f",
    }
    return {"step": f"{int(record['step']):>{len(str(steps))}}/{steps}"} | {
        name: f"{record[name]:<{width}}" for name, width in columns.items() if name in record
    }


DRIFT_TIME = 500  # at which the drift from the prior is measured


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
    # of latents [B, C, H, W], where the prior knows it: [B]
    log_prob: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    tick: Tick = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.asset)
        self.rates = {"grid": self.config.lr, "decoder": self.config.decoder_lr}
        groups = [
            {"params": parameters, "lr": self.rates[name], "name": name}
            for name, parameters in self.asset.groups().items()
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.tick = Tick()

    # One step.

    def step(self, step: int) -> None:
        views, pictures = self.look("views", step)
        x = self.prior.encode(pictures.images)
        per_asset = len(x) // len(self.asset)
        t = draw_times(
            self.config.window,
            step,
            len(self.asset),
            per_asset,
            self.streams.generator("t", step),
            shared=self.config.shared_time,
        )
        prompts = [prompt for prompt in self.prompts for _ in range(per_asset)]
        output = self.guidance(
            x, t.to(x.device), prompts, views.cameras[:, :16].to(x.device), step, pictures.images
        )
        if not bool(torch.isfinite(output.grad).all()):
            raise LossNotFiniteError(
                f"--prior: expected finite predictions, got NaN or infinity at step {step}. Lower"
                " --guidance-scale."
            )
        loss = distillation_loss(x, output, images=pictures.images)
        figures = {"opacity": float(pictures.opacity.detach().mean()), "grad": float(output.grad.norm())}
        for name in ("sparsity", "opacity"):
            if weight := ramp_of(getattr(self.config, name))(step):
                loss = loss + weight * self.asset.regularisers()[name].mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * (
                1 - (1 - self.config.lr_end) * step / self.config.steps
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.geometry is not None:
            output.terms |= self.geometry.add(self.asset, list(self.asset.parameters()), self.prompts, step)
        self.optimizer.step()
        self.tick.add(output, figures, pictures.images)

    def look(self, stream: str, step: int) -> tuple[Views, Pictures]:
        views = self.renderer.draw(len(self.asset), self.streams.generator(stream, step))
        below = self.background
        if below is None:
            drawn = torch.rand(len(self.asset), 3, generator=self.streams.generator("background", step))
            below = drawn.repeat_interleave(len(views.cameras) // len(self.asset), dim=0)
        return views, self.renderer.render(self.asset, views, below)

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """How well the prior knows what it sees: log density where it has one, else the error of its
        prediction of a fixed noise.
        """
        views, pictures = self.look("drift", 0)
        x = self.prior.encode(pictures.images)
        prompts = [prompt for prompt in self.prompts for _ in range(len(x) // len(self.asset))]
        if self.log_prob is not None:
            return {"log_prob": float(self.log_prob(x, prompts).median())}
        schedule = NoiseSchedule(self.prior.alphas_cumprod)
        t = torch.full((len(x),), DRIFT_TIME, device=x.device)
        noise = self.streams.noises(1, x, -1)[0]
        seen = self.prior.predict_noise(
            schedule.mix(x, noise, t), t, self.prior.embed(prompts), views.cameras[:, :16].to(x)
        )
        return {"prior_error": float((seen - noise).square().mean())}

    @torch.no_grad()
    def finished(self) -> Asset:
        """What a run keeps: all assets, or of several starts the best. They are seen from the same sides, on
        white or their background.
        """
        if not isinstance(self.guidance, BestOfN):
            return self.asset
        views = evenly_around(len(self.asset), self.guidance.denoiser.views, **FINISHED)
        seen = self.renderer.render(
            self.asset, views, torch.ones(3) if self.background is None else self.background
        )
        prompts = [prompt for prompt in self.prompts for _ in range(self.guidance.denoiser.views)]
        return self.asset.pick(
            self.guidance.best(seen.images, prompts, views.cameras[:, :16].to(seen.images))
        )

    # States.

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        tensors = {f"asset.{name}": value for name, value in self.asset.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors("optim", self.optimizer)
        for name, part in self._stateful().items():
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        return tensors, {"tick": {"values": self.tick.values}}

    def load(self, tensors: Mapping[str, torch.Tensor], meta: Mapping) -> None:
        names = ("asset", *self._stateful())
        of_part = {name: below(tensors, f"{name}.") for name in names}
        self.asset.load_state_dict(of_part["asset"])
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        for name, part in self._stateful().items():
            part.load_state_dict(of_part[name])
        self.tick.values = {name: list(values) for name, values in meta["tick"]["values"].items()}

    def _stateful(self) -> dict:
        parts = {"guidance": self.guidance, "geometry": self.geometry, "scores": self.tick.scores}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
