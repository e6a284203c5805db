"""Score distillation sampling: the base of every other method."""

from dataclasses import dataclass, field

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, GuidanceOutput
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import Denoiser, DenoiserSettings
from eg3d_rlhf.tuning.distill.streams import Streams
from training.config import check_knobs, knob

SDS = "Score distillation"


@dataclass(frozen=True, kw_only=True)
class SdsSettings:
    """Score distillation of the prior alone."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    samples: int = knob(1, "Noises per step, averaged.", SDS, low=1)
    image_loss: float = knob(0.0, "Weight of HiFA's loss on pictures, of the form sds.", SDS, low=0)

    def __post_init__(self):
        check_knobs(self)
        if self.image_loss and self.prior.form != "sds":
            raise ValueError(f"--image-loss: expected the form sds, got {self.prior.form}. Choose one of them.")


class Sds:
    """Mean over noises of w(t) (p - e), or another form's residual."""

    def __init__(self, prior: DiffusionPrior, settings: SdsSettings, *, views: int, streams: Streams):
        self.settings, self.denoiser = settings, Denoiser(prior, settings.prior, views=views, streams=streams)

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, prompts: list[str], cameras: torch.Tensor | None, step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        """One step; arguments as in interfaces.Guidance."""
        d, s = self.denoiser, self.settings
        noise, x_t, _, prediction = d.ask(s.samples, x, t, prompts, cameras, step)
        residuals = d.residuals(x, noise, t, x_t, prediction)
        grad = residuals.mean(0)
        output = GuidanceOutput(grad=grad, terms={"sds_norm": d.compare(residuals, grad)["sds_norm"]})
        if s.image_loss:
            if images is None:
                raise ValueError("--image-loss: expected the rendered pictures, got none. Give images to the guidance.")
            bar = d.schedule.alpha(t, images)
            weight = s.image_loss * d.schedule.weight(t, s.prior.weighting, images) * bar.sqrt() / (1 - bar).sqrt()  # type: ignore[arg-type]
            decoded = [d.prior.decode(x0) for x0 in d.x0(x_t, prediction.guided(s.prior.guidance_scale), t)]
            output.image_grad = torch.stack([gradients.image_loss(images, seen, weight) for seen in decoded]).mean(0)
        return output

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing: all draws follow from the step."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing to do."""
