"""Optimises a batch of assets by one distillation method.

Each step renders views of the assets, encodes them to latents of the prior, samples diffusion times and
noises, computes the gradient of the method, and updates the parameters of the assets with it.

All random numbers come from `Streams` by (seed, stream, step). A resumed run is therefore bitwise identical
to a run that was not interrupted.

Shapes: A = number of assets; V views of each asset; B = A V images, with the views of an asset adjacent; K
noises; C, H, W channels, rows and columns of latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, Guidance, GuidanceOutput
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.views import FINISHED, RenderedViews, Renderer, Views, evenly_around
from eg3d_rlhf.models.weights import entries_below
from eg3d_rlhf.tuning.distill.config import LoopConfig, parse_ramp
from eg3d_rlhf.tuning.distill.gradients import History, distillation_loss
from eg3d_rlhf.tuning.distill.guidance.geometry import ProgressiveGeometry
from eg3d_rlhf.tuning.distill.guidance.sds import BestOfN
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, Streams, draw_times
from training import checkpoint
from training.phases import LossNotFiniteError

# Metrics of a run, and warnings of typical failures. A tick is a number of steps, over which metrics are
# averaged. stats.jsonl has one line per tick.

WINDOW = 200  # number of last steps with whose scores new scores are compared
_SHARES = (0.1, 0.5, 0.9)  # quantiles of the gap that are reported
_DIFFER = 0.02  # smallest relative change of a metric that is regarded as a change


class Tick:
    """Metrics of the steps since the last line of stats.jsonl."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}  # metric -> its values in the steps of this tick
        self.scores = History(WINDOW)  # scores of the last steps, also of earlier ticks

    def add(
        self, guidance_output: GuidanceOutput, metrics: Mapping[str, float], images: torch.Tensor
    ) -> None:
        """Add the metrics of one step.

        Args:
            guidance_output: result of the guidance, whose scores and terms are added.
            metrics: further metrics, name -> value.
            images: [B, 3, h, w], rendered images, whose values should lie in 0..1.
        """
        for metric, value in metrics.items():
            self._append(metric, float(value))
        # Terms have one value per asset [A] or per image [B]; the line reports their mean.
        for metric, term_values in guidance_output.terms.items():
            self._append(metric, *term_values.detach().flatten().tolist())
        self._append("image_low", float(images.detach().min()))
        self._append("image_high", float(images.detach().max()))
        if guidance_output.scores is not None:
            scores = guidance_output.scores.detach().float().cpu()  # [K, A]
            # Share of scores outside the range of the last steps. A large share shows that images change into
            # a range of scores that was not observed before.
            if self.scores.rows.numel():
                low = self.scores.rows.min()
                high = self.scores.rows.max()
                is_out_of_range = (scores < low) | (scores > high)
                self._append("scores_out_of_range", *is_out_of_range.float().flatten().tolist())
            # Added after the comparison, so that a score does not widen the range with which it is compared.
            self.scores.add(scores)
            self._append("reward", *scores.flatten().tolist())
            self._append("gap", *(scores.amax(0) - scores.amin(0)).tolist())
        if guidance_output.winner is not None:
            # -1 stands for a pair to which the judge gave no answer.
            answered_winners = guidance_output.winner[guidance_output.winner >= 0]
            self._append("first_wins", *(answered_winners == 0).float().tolist())
            self._append("unanswered", *(guidance_output.winner < 0).float().tolist())
        # True where images were not moved away from the loser.
        if guidance_output.one_sided is not None:
            self._append("one_sided", *guidance_output.one_sided.float().tolist())

    def _append(self, metric: str, *new_values: float) -> None:
        """Append values of the metric `metric` to the values of this tick."""
        self.values.setdefault(metric, []).extend(new_values)

    def line(self, step: int, drift: Mapping[str, float]) -> dict[str, float]:
        """Return the line of stats.jsonl for the tick that ends after `step` steps, and begin the next tick.

        Args:
            step: number of steps since the start of the run.
            drift: metrics of the drift from the prior, name -> value.
        """
        stats_line: dict[str, float] = {"step": step, **drift}
        for metric, metric_values in sorted(self.values.items()):
            if not metric_values:
                continue
            # float64, so that rounding errors of long means are negligible.
            values_float64 = torch.tensor(metric_values, dtype=torch.float64)
            if metric == "gap":
                # Quantiles instead of the mean, which a few large gaps would dominate.
                stats_line |= {
                    f"gap_{int(100 * share)}": float(values_float64.quantile(share)) for share in _SHARES
                }
            elif metric == "image_low":
                stats_line[metric] = float(values_float64.min())
            elif metric == "image_high":
                stats_line[metric] = float(values_float64.max())
            else:
                stats_line[metric] = float(values_float64.mean())
        self.values = {}
        return stats_line


def find_warnings(stats_lines: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return warnings of typical failures in the newest tick: name -> text with its remedy.

    Args:
        stats_lines: lines of stats.jsonl so far, oldest first.
    """
    newest_line = stats_lines[-1]
    warning_by_name = {}
    # Exactly 1: images were not moved away from the loser in any step of the tick.
    if newest_line.get("one_sided") == 1:
        warning_by_name["gaps"] = (
            "every gap between scores is below tau, so images are never moved away from losers. Use a lower"
            " --set tau, or --set tau_mode=quantile."
        )
    if newest_line.get("gap_90") == 0:
        warning_by_name["flat"] = (
            "the images of all noises got the same score, so there is no preference. Use another --reward, or"
            " a larger --set resolution."
        )
    if newest_line.get("first_wins") in (0, 1):
        warning_by_name["winner"] = (
            f"the first noise won {newest_line['first_wins']:.0%} of the pairs, so the judge probably answers"
            " by the position of an image. Use a judge that is shown its images in random order."
        )
    if newest_line.get("unanswered", 0) > 0.5:
        warning_by_name["unanswered"] = (
            f"the judge gave no answer for {newest_line['unanswered']:.0%} of the pairs, and these steps use"
            " no preference. Use another --judge, or a --reward."
        )
    # Values may exceed 0..1 slightly by interpolation and rounding, hence the tolerance.
    if newest_line.get("image_low", 0) < -0.01 or newest_line.get("image_high", 1) > 1.01:
        value_range_text = f"{newest_line['image_low']:.2f} to {newest_line['image_high']:.2f}"
        warning_by_name["range"] = (
            f"the rendered images have values from {value_range_text}, but priors and rewards need 0 to 1."
            " Make the renderer return values in 0 to 1."
        )
    # The newest tick is compared with the third one before it, because the noise between adjacent ticks is
    # too large.
    if len(stats_lines) >= 4 and "reward" in newest_line:
        earlier_line = stats_lines[-4]
        # A tick has one of two metrics of the drift. Images become less likely under the prior if the error
        # of its prediction rises, or if their log density falls.
        drift = None
        drift_scale = 1.0
        if "log_prob" in newest_line:
            drift = earlier_line["log_prob"] - newest_line["log_prob"]
            drift_scale = abs(earlier_line["log_prob"])
        elif "prior_error" in newest_line:
            drift = newest_line["prior_error"] - earlier_line["prior_error"]
            drift_scale = abs(earlier_line["prior_error"])
        if (
            drift is not None
            and drift > _DIFFER * max(drift_scale, 1e-9)
            and newest_line["reward"] > earlier_line["reward"]
        ):
            warning_by_name["drift"] = (
                "the reward rises while the images become less likely under the prior, which shows that the"
                " reward is over-optimised. Use a lower weight of the reward."
            )
    return warning_by_name


def status_columns(stats_line: Mapping[str, float], step_count: int) -> dict[str, str]:
    """Return the columns of the status line with fixed widths: name -> text.

    Args:
        stats_line: line of stats.jsonl. Metrics that it does not contain have no column.
        step_count: number of steps of the run.
    """
    # Metric -> width and format of its column.
    format_by_metric = {
        "first_wins": "5.2f",
        "gap_50": "8.2g",
        "one_sided": "4.2f",
        "cosine": "5.2f",
        "reward": "8.3g",
        "log_prob": "8.3g",
        "prior_error": "6.3f",
        "opacity": "4.2f",
    }
    return {"step": f"{int(stats_line['step']):>{len(str(step_count))}}/{step_count}"} | {
        metric: f"{stats_line[metric]:<{width}}"
        for metric, width in format_by_metric.items()
        if metric in stats_line
    }


DRIFT_TIME = 500  # diffusion time at which the drift from the prior is measured


@dataclass(kw_only=True)
class Distillation:
    """Optimisation of a batch of assets by one method.

    `step` performs one step. `state` and `load` save and restore everything that changes during the
    optimisation.
    """

    asset: Asset  # the assets that are optimised, [A]
    # One prompt for each asset; with several starts of an asset, its prompt occurs several times.
    prompts: list[str]
    prior: DiffusionPrior  # frozen diffusion model
    renderer: Renderer  # samples cameras and renders the assets
    guidance: Guidance  # computes the gradient with respect to the latents
    config: LoopConfig  # settings of the optimisation
    streams: Streams  # random streams
    background: torch.Tensor | None = None  # [3] in 0..1; None: a random colour for each asset and step
    geometry: ProgressiveGeometry | None = None  # geometry reward, or None
    # Function from latents [B, C, H, W] and B prompts to their exact log density [B]; None if the prior has
    # none.
    log_prob: Callable[[torch.Tensor, list[str]], torch.Tensor] | None = None
    optimizer: torch.optim.Optimizer = field(init=False)
    tick: Tick = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.asset)
        self.rates = {
            "grid": self.config.lr,
            "decoder": self.config.decoder_lr,
        }  # group of parameters -> initial rate
        # `step` identifies the groups by "name", to change their learning rates.
        parameter_groups = [
            {"params": parameters, "lr": self.rates[name], "name": name}
            for name, parameters in self.asset.groups().items()
        ]
        # A tiny eps, because the gradients of distillation can be small: a larger eps would reduce the size
        # of steps.
        self.optimizer = torch.optim.Adam(parameter_groups, betas=(0.9, 0.99), eps=1e-15)
        self.tick = Tick()

    # --- one step

    def step(self, step: int) -> None:
        """Perform one step of the optimisation. `step` is its number, from 0.

        Raises: LossNotFiniteError if the gradient contains NaN or infinity.
        """
        views, rendered_views = self.look("views", step)
        x = self.prior.encode(rendered_views.images)
        views_per_asset = len(x) // len(self.asset)
        t = draw_times(
            self.config.window,
            step,
            len(self.asset),
            views_per_asset,
            self.streams.generator("t", step),
            shared=self.config.shared_time,
        )
        # B prompts, one for each image; the views of an asset are adjacent.
        image_prompts = [prompt for prompt in self.prompts for _ in range(views_per_asset)]
        cam2world = views.cameras[:, :16].to(x.device)  # the other 9 numbers of a camera are its intrinsics
        guidance_output = self.guidance(
            x, t.to(x.device), image_prompts, cam2world, step, rendered_views.images
        )
        # Without this check Adam would make all parameters NaN, and checkpoints would store them.
        if not bool(torch.isfinite(guidance_output.grad).all()):
            raise LossNotFiniteError(
                f"--prior: the gradient contains NaN or infinity at step {step}, probably because predictions"
                " of the prior overflow. Use a lower --guidance-scale, or --set amp=off."
            )
        loss = distillation_loss(x, guidance_output, images=rendered_views.images)
        metrics = {
            "opacity": float(rendered_views.opacity.detach().mean()),
            "grad": float(guidance_output.grad.norm()),
        }
        for regulariser in ("sparsity", "opacity"):
            # A regulariser with the weight 0 is not computed.
            if regulariser_weight := parse_ramp(getattr(self.config, regulariser))(step):
                loss = loss + regulariser_weight * self.asset.regularisers()[regulariser].mean()
        # Learning rates change linearly with the step, from their initial value to lr_end times that value.
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = self.rates[parameter_group["name"]] * (
                1 - (1 - self.config.lr_end) * step / self.config.steps
            )
        # With None in place of zeros, Adam leaves parameters without a gradient unchanged.
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # After the backward pass, because the geometry reward is scaled by the norms of the gradients in
        # `.grad`.
        if self.geometry is not None:
            guidance_output.terms |= self.geometry.add(
                self.asset, list(self.asset.parameters()), self.prompts, step
            )
        self.optimizer.step()
        self.tick.add(guidance_output, metrics, rendered_views.images)

    def look(self, stream: str, step: int) -> tuple[Views, RenderedViews]:
        """Sample views of all assets and render them.

        Args:
            stream: name of the random stream of the cameras.
            step: number of the step, which together with the stream determines the random numbers.
        Returns: the views, and their renders.
        """
        views = self.renderer.draw(len(self.asset), self.streams.generator(stream, step))
        background = self.background
        if background is None:
            colours = torch.rand(len(self.asset), 3, generator=self.streams.generator("background", step))
            # From assets [A, 3] to images [B, 3].
            background = colours.repeat_interleave(len(views.cameras) // len(self.asset), dim=0)
        return views, self.renderer.render(self.asset, views, background)

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """Measure how likely the renders of the assets are under the prior.

        Returns: dictionary with one key. If the prior has an exact density, the key is "log_prob", and the
        value is the median log density of the renders in nats. Otherwise the key is "prior_error", and the
        value is the mean squared error with which the prior predicts a fixed noise, which is added to the
        latents of the renders at the diffusion time DRIFT_TIME.
        """
        # All random numbers are the same at every call, so that changes come from the assets only.
        views, rendered_views = self.look("drift", 0)
        x = self.prior.encode(rendered_views.images)
        prompts = [prompt for prompt in self.prompts for _ in range(len(x) // len(self.asset))]
        if self.log_prob is not None:
            # The median, because a single asset far from all modes would dominate the mean.
            return {"log_prob": float(self.log_prob(x, prompts).median())}
        schedule = NoiseSchedule(self.prior.alphas_cumprod)
        t = torch.full((len(x),), DRIFT_TIME, device=x.device)
        # Steps of the optimisation are >= 0, so the step -1 gives a noise of its own. [0]: one noise.
        noise = self.streams.noises(1, x, -1)[0]
        predicted_noise = self.prior.predict_noise(
            schedule.mix(x, noise, t), t, self.prior.embed(prompts), views.cameras[:, :16].to(x)
        )
        return {"prior_error": float((predicted_noise - noise).square().mean())}

    @torch.no_grad()
    def finished(self) -> Asset:
        """Return the assets that the run keeps: with best-of-n the best start of each asset, else all."""
        # Only best-of-n optimises more assets than it keeps.
        if not isinstance(self.guidance, BestOfN):
            return self.asset
        views_per_asset = self.guidance.denoiser.views
        views = evenly_around(len(self.asset), views_per_asset, **FINISHED)
        # A white background in place of a random one, so that all starts are compared on the same background.
        background = torch.ones(3) if self.background is None else self.background
        rendered_views = self.renderer.render(self.asset, views, background)
        image_prompts = [prompt for prompt in self.prompts for _ in range(views_per_asset)]
        cam2world = views.cameras[:, :16].to(rendered_views.images)
        return self.asset.select(self.guidance.best(rendered_views.images, image_prompts, cam2world))

    # --- checkpoints

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return the state of the optimisation for checkpoints: tensors by name, and values for JSON."""
        tensors = {f"asset.{name}": tensor for name, tensor in self.asset.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors("optim", self.optimizer)
        for name, stateful_object in self._stateful().items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in stateful_object.state_dict().items()}
        return tensors, {"tick": {"values": self.tick.values}}

    def load(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping) -> None:
        """Restore the state of the optimisation from the result of `state`."""
        # The keys of tensors have the form "part.name".
        object_names = ("asset", *self._stateful())
        states = {name: entries_below(tensors, f"{name}.") for name in object_names}
        self.asset.load_state_dict(states["asset"])
        checkpoint.restore_optimizer("optim", self.optimizer, dict(tensors))
        for name, stateful_object in self._stateful().items():
            stateful_object.load_state_dict(states[name])
        self.tick.values = {
            name: list(metric_values) for name, metric_values in metadata["tick"]["values"].items()
        }

    def _stateful(self) -> dict:
        """Return the objects besides the assets whose state belongs to a checkpoint: name -> object."""
        object_by_name = {"guidance": self.guidance, "geometry": self.geometry, "scores": self.tick.scores}
        return {
            name: stateful_object
            for name, stateful_object in object_by_name.items()
            if hasattr(stateful_object, "state_dict")
        }
