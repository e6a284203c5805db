"""Optimises assets together against a prior, under one method. A resumed run is bitwise identical to one
without a stop.

    render -> encode -> time and noise -> gradient of the guidance -> parameters of the assets

Letters: A assets, V views of each, B = A * V images, K noises. All random numbers come from `Streams` by
(seed, stream, step).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance, GuidanceOutput
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import FINISHED, Pictures, Renderer, Views, evenly_around
from eg3d_rlhf.models.weights import below
from eg3d_rlhf.tuning.distill.config import LoopConfig, parse_ramp
from eg3d_rlhf.tuning.distill.gradients import History, distillation_loss
from eg3d_rlhf.tuning.distill.guidance.geometry import ProgressiveGeometry
from eg3d_rlhf.tuning.distill.guidance.sds import BestOfN
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, Streams, draw_times
from training import checkpoint
from training.phases import LossNotFiniteError

# Figures of a run, and warnings of known failures. A tick is a number of steps; its figures are means over
# them.

WINDOW = 200  # number of last steps whose range of scores new scores are compared with
_SHARES = (0.1, 0.5, 0.9)  # reported quantiles of the gap
_DIFFER = 0.02  # smallest relative change that counts as a change


class Tick:
    """Figures of the steps since the last line of stats.jsonl."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}  # figure -> its values in the steps of this tick
        self.scores = History(WINDOW)  # kept across ticks, for the range of scores

    def add(self, output: GuidanceOutput, figures: Mapping[str, float], images: torch.Tensor) -> None:
        """Add the figures of one step.

        Args:
            output: of the guidance.
            figures: further ones by name.
            images: rendered images, which should lie in 0..1.
        """
        for name, value in figures.items():
            self._append(name, float(value))
        # Terms are per asset [A]; the line reports their mean.
        for name, values in output.terms.items():
            self._append(name, *values.detach().flatten().tolist())
        self._append("image_low", float(images.detach().min()))
        self._append("image_high", float(images.detach().max()))
        if output.scores is not None:
            scores = output.scores.detach().float().cpu()  # [K, A]
            # Scores outside the range of the last steps show that a reward leaves known territory.
            if self.scores.rows.numel():
                low = self.scores.rows.min()
                high = self.scores.rows.max()
                self._append(
                    "scores_out_of_range", *((scores < low) | (scores > high)).float().flatten().tolist()
                )
            # After the comparison: a score must not widen the range that it is compared with.
            self.scores.add(scores)
            self._append("reward", *scores.flatten().tolist())
            self._append("gap", *(scores.amax(0) - scores.amin(0)).tolist())
        if output.winner is not None:
            # -1 means that the judge gave no answer.
            decided = output.winner[output.winner >= 0]
            self._append("first_wins", *(decided == 0).float().tolist())
            self._append("unanswered", *(output.winner < 0).float().tolist())
        # True where the loser was not pushed away.
        if output.one_sided is not None:
            self._append("one_sided", *output.one_sided.float().tolist())

    def _append(self, name: str, *values: float) -> None:
        self.values.setdefault(name, []).extend(values)

    def line(self, step: int, drift: Mapping[str, float]) -> dict[str, float]:
        """Return the record of the tick that ends after `step` steps, and begin the next one."""
        record: dict[str, float] = {"step": step, **drift}
        for name, values in sorted(self.values.items()):
            if not values:
                continue
            # float64, so that means over many steps have no rounding errors.
            tensor = torch.tensor(values, dtype=torch.float64)
            # The mean gap alone would hide a few large ones, so quantiles are reported.
            if name == "gap":
                record |= {f"gap_{int(100 * share)}": float(tensor.quantile(share)) for share in _SHARES}
            else:
                record[name] = float(
                    {"image_low": tensor.min, "image_high": tensor.max}.get(name, tensor.mean)()
                )
        self.values = {}
        return record


def find_warnings(lines: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return warnings of known failures in the newest line, by name. Each contains its remedy."""
    last = lines[-1]
    warnings = {}
    # Exactly 1: the loser was not pushed away in any step of the tick.
    if last.get("one_sided") == 1:
        warnings["gaps"] = (
            "every gap is below --tau, so no loser is pushed away. Lower tau, or use --set tau_mode=quantile."
        )
    if last.get("gap_90") == 0:
        warnings["flat"] = (
            "all noises got the same reward, so there is no preference. Check the reward, or give it larger"
            " images."
        )
    if last.get("first_wins") in (0, 1):
        warnings["winner"] = (
            f"the first noise won {last['first_wins']:.0%} of the pairs, so the judge prefers a position."
            " Shuffle the order of its images."
        )
    if last.get("unanswered", 0) > 0.5:
        warnings["unanswered"] = (
            f"{last['unanswered']:.0%} of the pairs had no answer. These steps use no preference. Check the"
            " judge."
        )
    # A small tolerance: interpolation and rounding can leave 0..1 slightly.
    if last.get("image_low", 0) < -0.01 or last.get("image_high", 1) > 1.01:
        reach = f"{last['image_low']:.2f} to {last['image_high']:.2f}"
        warnings["range"] = (
            f"image values are {reach}, expected 0 to 1: priors and rewards interpret them wrongly."
        )
    # Three ticks apart, so that the noise of single ticks is not mistaken for a trend.
    if len(lines) >= 4 and "reward" in last:
        then = lines[-4]
        # A rising error, or a falling log density, means that images become less likely under the prior.
        drift = [
            then[n] - last[n] if n == "log_prob" else last[n] - then[n]
            for n in ("log_prob", "prior_error")
            if n in last
        ]
        size = max((abs(then[n]) for n in ("log_prob", "prior_error") if n in last), default=1.0)
        if drift and drift[0] > _DIFFER * max(size, 1e-9) and last["reward"] > then["reward"]:
            warnings["drift"] = (
                "the reward rises while the images become less likely under the prior, so the reward is"
                " being exploited. Lower its weight."
            )
    return warnings


def status_columns(record: Mapping[str, float], steps: int) -> dict[str, str]:
    """Format the figures of a line for the status line, with fixed widths."""
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


DRIFT_TIME = 500  # time of the diffusion at which the drift from the prior is measured


@dataclass(kw_only=True)
class Distillation:
    """Optimisation of assets under one method. `step` performs one step; `state` and `load` save and restore
    everything that changes.
    """

    asset: Asset
    prompts: list[str]  # one per asset, A
    prior: DiffusionPrior
    renderer: Renderer
    guidance: Guidance
    config: LoopConfig
    streams: Streams
    background: torch.Tensor | None = None  # [3] in 0..1; None: a random colour for each asset and step
    geometry: ProgressiveGeometry | None = None
    # Exact log density [B] of latents [B, C, H, W] under the prior, if it has one.
    log_prob: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    tick: Tick = field(init=False)

    def __post_init__(self) -> None:
        # The prompts include several starts of the same asset.
        assert len(self.prompts) == len(self.asset)
        self.rates = {"grid": self.config.lr, "decoder": self.config.decoder_lr}
        # Grids and decoders have different learning rates; `name` finds them again in `step`.
        groups = [
            {"params": parameters, "lr": self.rates[name], "name": name}
            for name, parameters in self.asset.groups().items()
        ]
        # A tiny eps: gradients of distillation can be small, and a larger eps would act as a learning rate.
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.tick = Tick()

    # --- one step

    def step(self, step: int) -> None:
        """Perform step number `step`: render, compute the guidance's gradient, update the assets."""
        views, rendered = self.look("views", step)
        x = self.prior.encode(rendered.images)
        per_asset = len(x) // len(self.asset)
        t = draw_times(
            self.config.window,
            step,
            len(self.asset),
            per_asset,
            self.streams.generator("t", step),
            shared=self.config.shared_time,
        )
        # One prompt per image; the views of an asset are adjacent.
        prompts = [prompt for prompt in self.prompts for _ in range(per_asset)]
        output = self.guidance(
            x, t.to(x.device), prompts, views.cameras[:, :16].to(x.device), step, rendered.images
        )
        # Without this check Adam would make all parameters NaN, and the state would be saved.
        if not bool(torch.isfinite(output.grad).all()):
            raise LossNotFiniteError(
                f"--prior: its predictions are NaN or infinite at step {step}. Lower --guidance-scale, or"
                " use --set amp=off."
            )
        # B is the number of images, so the loss is a mean over them.
        loss = distillation_loss(x, output, images=rendered.images)
        figures = {"opacity": float(rendered.opacity.detach().mean()), "grad": float(output.grad.norm())}
        for name in ("sparsity", "opacity"):
            # A weight of 0 skips the computation, so runs without regularisers are not slower.
            if weight := parse_ramp(getattr(self.config, name))(step):
                loss = loss + weight * self.asset.regularisers()[name].mean()
        # Learning rates decrease linearly from their start to `lr_end` times it.
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["name"]] * (
                1 - (1 - self.config.lr_end) * step / self.config.steps
            )
        # None instead of zeros: Adam then skips parameters without a gradient.
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # After the backward pass: the geometry reward is scaled by the norms of the gradients in .grad.
        if self.geometry is not None:
            output.terms |= self.geometry.add(self.asset, list(self.asset.parameters()), self.prompts, step)
        self.optimizer.step()
        self.tick.add(output, figures, rendered.images)

    def look(self, stream: str, step: int) -> tuple[Views, Pictures]:
        """Sample views of all assets and render them; random streams follow from `stream` and the step."""
        views = self.renderer.draw(len(self.asset), self.streams.generator(stream, step))
        background = self.background
        if background is None:
            colours = torch.rand(len(self.asset), 3, generator=self.streams.generator("background", step))
            # [A, 3] to [B, 3]: all views of an asset have the same colour.
            background = colours.repeat_interleave(len(views.cameras) // len(self.asset), dim=0)
        return views, self.renderer.render(self.asset, views, background)

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """Measure how likely the renders are under the prior: their log density if the prior has one, else
        the error of its prediction of a fixed noise.
        """
        views, rendered = self.look("drift", 0)
        x = self.prior.encode(rendered.images)
        prompts = [prompt for prompt in self.prompts for _ in range(len(x) // len(self.asset))]
        if self.log_prob is not None:
            # The median: a single asset far from all modes would dominate the mean.
            return {"log_prob": float(self.log_prob(x, prompts).median())}
        schedule = NoiseSchedule(self.prior.alphas_cumprod)
        # The same views, time and noise at every call: only the assets change.
        t = torch.full((len(x),), DRIFT_TIME, device=x.device)
        noise = self.streams.noises(1, x, -1)[0]
        predicted = self.prior.predict_noise(
            schedule.mix(x, noise, t), t, self.prior.embed(prompts), views.cameras[:, :16].to(x)
        )
        return {"prior_error": float((predicted - noise).square().mean())}

    @torch.no_grad()
    def finished(self) -> Asset:
        """Return the assets that the run keeps: all, or the best of several starts. They are compared in the
        same views, on white or their background.
        """
        # Only best of n optimises more assets than it keeps.
        if not isinstance(self.guidance, BestOfN):
            return self.asset
        views = evenly_around(len(self.asset), self.guidance.denoiser.views, **FINISHED)
        rendered = self.renderer.render(
            self.asset, views, torch.ones(3) if self.background is None else self.background
        )
        prompts = [prompt for prompt in self.prompts for _ in range(self.guidance.denoiser.views)]
        return self.asset.pick(
            self.guidance.best(rendered.images, prompts, views.cameras[:, :16].to(rendered.images))
        )

    # --- checkpoints

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return tensors and JSON values from which `load` continues."""
        tensors = {f"asset.{name}": value for name, value in self.asset.state_dict().items()}
        # Without Adam's moments a resumed run would differ from one without a stop.
        tensors |= checkpoint.optimizer_tensors("optim", self.optimizer)
        for name, part in self._stateful().items():
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        return tensors, {"tick": {"values": self.tick.values}}

    def load(self, tensors: Mapping[str, torch.Tensor], meta: Mapping) -> None:
        """Restore the result of `state`."""
        # Keys have the form part.name, so each part gets the tensors after its prefix.
        names = ("asset", *self._stateful())
        states = {name: below(tensors, f"{name}.") for name in names}
        self.asset.load_state_dict(states["asset"])
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        for name, part in self._stateful().items():
            part.load_state_dict(states[name])
        self.tick.values = {name: list(values) for name, values in meta["tick"]["values"].items()}

    def _stateful(self) -> dict:
        """Return the parts that have a state besides the assets: some methods and rewards have none."""
        parts = {"guidance": self.guidance, "geometry": self.geometry, "scores": self.tick.scores}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
