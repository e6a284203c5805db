"""Implements a prior in closed form: a mixture of Gaussians, whose noise prediction and likelihood are exact.

Letters: B images, M components, E entries of an embedding, C, H, W of images; a, s as in core/interfaces.py.
"""

import math

import torch

from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from training.config import check_choice


class GmmPrior:
    """Mixture of Gaussians p(x | embedding) = sum_m softmax(to_logits embedding)_m N(x; mean_m, std_m^2).
    Noised, it has the means a mean_m and the variances a^2 std_m^2 + s^2.

    Latents are scale (2 images - 1), with as many channels as the means. Decoding does not clip. If an
    optimiser works entry by entry (Adam), the means should be permutations of one another, so that all modes
    are equally easy to reach.
    """

    views = 1

    def __init__(
        self,
        means: torch.Tensor,
        stds: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        to_logits: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
        alphas_cumprod: torch.Tensor | None = None,
    ):
        """Make the mixture.

        Args:
            means: [M, C, H, W].
            stds: [M] > 0.
            prompts: text -> embedding [E]; "" is the null prompt, "text, side" a prompt with a viewing
                direction. to_logits: [M, E]; None: the identity. scale: of latents. alphas_cumprod: [1000];
                None: scaled_linear.
        """
        # By default an embedding contains the logits themselves.
        self.to_logits = torch.eye(len(means)).to(means) if to_logits is None else to_logits
        sizes = {len(embedding) for embedding in prompts.values()}
        assert (
            stds.shape == means.shape[:1] and self.to_logits.shape == (len(means), *sizes) and "" in prompts
        )
        self.means = means
        self.stds = stds
        self.prompts = prompts
        self.scale = scale
        self.alphas_cumprod = NoiseSchedule(alphas_cumprod).alphas_cumprod
        self.latent_shape = (means.shape[1], means.shape[2], means.shape[3])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images to latents."""
        return self.scale * (2 * images - 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert latents to images, which leave 0..1 where the latents leave -scale..scale."""
        return (latents / self.scale + 1) / 2

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Return embeddings [B, 1, E]. A view without an embedding of its own gets that of its prompt.

        Raises: ValueError for an unknown prompt.
        """
        embedded = []
        for prompt, direction in zip(prompts, directions or [""] * len(prompts), strict=True):
            key = f"{prompt}, {direction}" if f"{prompt}, {direction}" in self.prompts else prompt
            check_choice("GmmPrior.embed", key, self.prompts)
            embedded.append(self.prompts[key])
        # One token per prompt.
        return torch.stack(embedded)[:, None]

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return -s times the score of the noised mixture, [B, C, H, W]. Cameras are not used.

        Differentiable in: x_t, cond.
        """
        bar = self.alphas_cumprod.to(x_t)[t.to(x_t.device)][:, None]  # [B, 1]
        log_joint, variance = self._log_joint(x_t, cond, bar)
        # The score is sum_m r_m (a mean_m - x) / variance_m with responsibilities r, the softmax of the log
        # joint density.
        weights = log_joint.softmax(1) / variance  # [B, M]
        x = x_t.flatten(1)
        means = self.means.flatten(1)
        from_means = weights.sum(1, keepdim=True) * x - bar.sqrt() * (weights @ means)  # [B, C*H*W]
        return ((1 - bar).sqrt() * from_means).view_as(x_t)

    def log_prob(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Compute the exact log p(x | cond) of latents, [B], in nats."""
        # Without noise: a = 1 and s = 0.
        return self._log_joint(x, cond, torch.ones(len(x), 1).to(x))[0].logsumexp(1)

    def nearest(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index of the nearest mean [B] and the root mean square distance to it per entry [B]."""
        distance, index = torch.cdist(x.flatten(1), self.means.flatten(1)).min(1)
        return index, distance / math.sqrt(x[0].numel())

    def _log_joint(
        self, x_t: torch.Tensor, cond: torch.Tensor, bar: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute log(share_m N_m(x_t)) and the variances, both [B, M]."""
        # Mean over the tokens of the embedding [B, T, E], then [B, M].
        logits = cond.mean(1) @ self.to_logits.T
        x = x_t.flatten(1)
        means = self.means.flatten(1)
        # |x - a mean|^2 as a matrix product, which needs no tensor [B, M, C, H, W].
        square = (
            x.square().sum(1, keepdim=True) - 2 * bar.sqrt() * (x @ means.T) + bar * means.square().sum(1)
        )
        # [B, M]; here `bar` is a^2.
        variance = bar * self.stds.square() + 1 - bar
        return (
            logits.log_softmax(1) - square / (2 * variance) - x.shape[1] / 2 * (2 * math.pi * variance).log(),
            variance,
        )
