"""Mapping network: latent z and camera label c to the intermediate latents ws.

Shapes: N batch, Z z_dim, K c_dim, W w_dim, L num_ws.
"""

import torch

from training.layers import FullyConnectedLayer, normalize_2nd_moment


class MappingNetwork(torch.nn.Module):
    """StyleGAN2 mapping network with label embedding.

    x = norm(z) and y = norm(embed(c)), concatenated, then `num_layers` leaky-ReLU layers with learning-rate multiplier 0.01. `z_dim = 0`
    makes a label-only mapping (the discriminator's), `num_ws = None` a single vector without the L axis and without `w_avg`.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
        embed_features = 0 if c_dim == 0 else (embed_features or w_dim)
        hidden = layer_features or w_dim
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        sizes = [z_dim + embed_features] + [hidden] * (num_layers - 1) + [w_dim]
        for i, (size_in, size_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            setattr(self, f"fc{i}", FullyConnectedLayer(size_in, size_out, activation=activation, lr_multiplier=lr_multiplier))

    def forward(
        self,
        z: torch.Tensor | None,
        c: torch.Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> torch.Tensor:
        """Map latents to ws.

        Args:
            z: [N, Z], standard normal (None where z_dim is 0).
            c: [N, K] label (None where c_dim is 0).
            truncation_psi: w_avg + psi * (w - w_avg); 1 leaves w alone.
            truncation_cutoff: truncate ws[:, :cutoff] only; None truncates all.
            update_emas: move w_avg towards the batch mean (beta 0.998); only the discriminator's generator pass does so.
        Returns: [N, L, W], or [N, W] where num_ws is None. Differentiable in z and c.
        """
        parts = []
        if self.z_dim > 0:
            parts.append(normalize_2nd_moment(z.to(torch.float32)))
        if self.c_dim > 0:
            parts.append(normalize_2nd_moment(self.embed(c.to(torch.float32))))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        if update_emas and self.w_avg_beta is not None and self.num_ws is not None:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return x
        ws = x.unsqueeze(1).repeat([1, self.num_ws, 1])  # [N, L, W]
        if truncation_psi != 1:
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws = torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)
        return ws
