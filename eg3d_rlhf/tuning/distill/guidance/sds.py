"""Score distillation sampling, the base of every other method; and best of n: the same from several starts,
of which the reward keeps the asset that it scores highest at the end.

No preference enters a gradient of best of n: it is what any tuning has to beat, at n times the work. Letters:
A assets, S starts of each, V views.
"""

import torch

from eg3d_rlhf.core.interfaces import GuidanceOutput
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.guidance.denoiser import Guided, Rewarded, told


class Sds(Guided):
    """Mean over noises of w(t) (p - e), or another form's residual."""

    @torch.no_grad()
    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        d = self.denoiser
        s = self.settings
        noise, x_t, _, prediction = d.ask(s.samples, x, t, prompts, cameras, step)
        residuals = d.residuals(x, noise, t, x_t, prediction)
        grad = residuals.mean(0)
        output = GuidanceOutput(grad=grad, terms={"sds_norm": d.compare(residuals, grad)["sds_norm"]})
        if s.image_loss:
            assert images is not None, "the rendered pictures"
            bar = d.schedule.alpha(t, images)
            weight = (
                s.image_loss * d.schedule.weight(t, s.prior.weighting, images) * bar.sqrt() / (1 - bar).sqrt()
            )
            decoded = [d.prior.decode(x0) for x0 in d.x0(x_t, prediction.guided(s.prior.guidance_scale), t)]
            output.image_grad = torch.stack(
                [gradients.image_loss(images, seen, weight) for seen in decoded]
            ).mean(0)
        return output


class BestOfN(Rewarded, Sds):
    """Distillation of S x A assets; those of start s stand at s A to (s + 1) A - 1."""

    @torch.no_grad()
    def best(self, images: torch.Tensor, prompts: list[str], cameras: torch.Tensor) -> list[int]:
        """Places of the A assets to keep: of each, the start with the largest mean reward over its views;
        equal ones, the first.

        Args: images [S A V, 3, h, w] in 0..1 of the finished assets; prompts: one per picture; cameras
            [S A V, 16].
        """
        d = self.denoiser
        # [S A]
        scores = d.per_asset(d.score(self.reward, images[None], told(self.reward, prompts, cameras)))[0]
        starts = self.settings.starts
        assets = len(scores) // starts
        chosen = scores.unflatten(0, (starts, assets)).argmax(0).cpu()  # [A]
        return (chosen * assets + torch.arange(assets)).tolist()
