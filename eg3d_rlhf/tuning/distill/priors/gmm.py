"""Implements a prior in closed form: a mixture of Gaussians, whose noise prediction and likelihood are exact.

Shapes: B images; M components; T tokens of an embedding with E entries each; C, H, W channels, rows and
columns of latents.
Symbols: a = sqrt(alphas_cumprod[t]) and s = sqrt(1 - alphas_cumprod[t]), the signal and noise levels of
x_t = a x + s e (see schedule.py). In the code, `bar` is alphas_cumprod[t] = a^2.
"""

import math

import torch

from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from training.config import check_choice


class GmmPrior:
    """Mixture of Gaussians p(x | embedding) = sum_m softmax(to_logits embedding)_m N(x; mean_m, std_m^2).

    At the time t, the noised mixture has the means a mean_m and the variances a^2 std_m^2 + s^2, with the
    signal level a and the noise level s.

    Latents are scale (2 images - 1). Decoding does not clip images to 0..1. The means should be permutations
    of one another: Adam scales each entry of a gradient separately, so otherwise some modes would be easier
    to reach.
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
            means: [M, C, H, W], means of the components.
            stds: [M], standard deviations of the components, > 0.
            prompts: text -> embedding [E]. "" is the null prompt, and "TEXT, side" is a prompt with a viewing
                direction.
            to_logits: [M, E], matrix that converts an embedding to the logits of the components. None: the
                identity, so that an embedding contains the logits.
            scale: factor of the latents.
            alphas_cumprod: [1000], alphas_cumprod of the noise schedule. None: those of the schedule
                scaled_linear.
        """
        self.to_logits = torch.eye(len(means)).to(means) if to_logits is None else to_logits
        embedding_sizes = {len(embedding) for embedding in prompts.values()}
        # The shape is (M, E) only if all embeddings have the same size E, because a set contains each size
        # once.
        assert self.to_logits.shape == (len(means), *embedding_sizes)
        assert stds.shape == means.shape[:1] and "" in prompts
        self.means = means
        self.stds = stds
        self.prompts = prompts
        self.scale = scale
        self.alphas_cumprod = NoiseSchedule(alphas_cumprod).alphas_cumprod
        self.latent_shape = (means.shape[1], means.shape[2], means.shape[3])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images [B, C, H, W] in 0..1 to latents [B, C, H, W]."""
        return self.scale * (2 * images - 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert latents [B, C, H, W] to images [B, C, H, W].

        Latents outside -scale..scale give values outside 0..1.
        """
        return (latents / self.scale + 1) / 2

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Return the embeddings of B prompts, [B, 1, E].

        Args:
            prompts: B prompts.
            directions: B viewing directions, or None. If "PROMPT, DIRECTION" has no embedding, that of PROMPT
                is returned.
        Raises: ValueError for a prompt without an embedding.
        """
        prompt_embeddings = []
        for prompt, direction in zip(prompts, directions or [""] * len(prompts), strict=True):
            prompt_key = f"{prompt}, {direction}" if f"{prompt}, {direction}" in self.prompts else prompt
            check_choice("GmmPrior.embed", prompt_key, self.prompts)
            prompt_embeddings.append(self.prompts[prompt_key])
        return torch.stack(prompt_embeddings)[:, None]  # the conditioning of a prompt is one token

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the exact expected noise, which is -s times the score of the noised mixture, [B, C, H, W].

        Args:
            x_t: [B, C, H, W], noised latents.
            t: [B], times.
            cond: [B, T, E], embeddings of the prompts.
            cameras: not used.
        Differentiable in x_t and cond.
        """
        bar = self.alphas_cumprod.to(x_t)[t.to(x_t.device)][:, None]  # [B, 1]
        log_joint, variance = self._log_joint(x_t, cond, bar)
        # The score is sum_m r_m (a mean_m - x) / variance_m with responsibilities r, the softmax of the log
        # joint density.
        component_weights = log_joint.softmax(1) / variance  # [B, M]
        x = x_t.flatten(1)
        means = self.means.flatten(1)
        # [B, C*H*W]
        minus_score = component_weights.sum(1, keepdim=True) * x - bar.sqrt() * (component_weights @ means)
        return ((1 - bar).sqrt() * minus_score).view_as(x_t)

    def log_prob(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Compute the exact log density log p(x | cond) of latents x [B, C, H, W], [B], in nats.

        `cond` [B, T, E] contains the embeddings of the prompts.
        """
        # Latents without noise have a^2 = 1 and s = 0. [0] is the log density of the components.
        return self._log_joint(x, cond, torch.ones(len(x), 1).to(x))[0].logsumexp(1)

    def nearest(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the index of the nearest mean, [B], and the root mean square difference from it, [B]."""
        distances, indices = torch.cdist(x.flatten(1), self.means.flatten(1)).min(1)
        return indices, distances / math.sqrt(x[0].numel())

    def _log_joint(
        self, x_t: torch.Tensor, cond: torch.Tensor, bar: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the log density of each component, log(share_m N_m(x_t)), and its variance, both [B, M].

        Args:
            x_t: [B, C, H, W], noised latents.
            cond: [B, T, E], embeddings of the prompts.
            bar: [B, 1], a^2.
        """
        logits = cond.mean(1) @ self.to_logits.T  # mean over tokens, [B, M]
        x = x_t.flatten(1)
        means = self.means.flatten(1)
        # |x - a mean|^2 as a matrix product, which needs no tensor [B, M, C, H, W].
        squared_distances = (
            x.square().sum(1, keepdim=True) - 2 * bar.sqrt() * (x @ means.T) + bar * means.square().sum(1)
        )
        variance = bar * self.stds.square() + 1 - bar  # [B, M]
        log_share = logits.log_softmax(1)
        log_norm = x.shape[1] / 2 * (2 * math.pi * variance).log()
        return log_share - squared_distances / (2 * variance) - log_norm, variance
