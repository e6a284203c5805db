"""The four phases of EG3D's GAN game as generators of named, unreduced losses; the loss terms are pure
functions of tensors.

Shapes: N batch, Z z_dim, K c_dim, C channels, R final and r raw resolution, P points.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torch_utils.ops import upfirdn2d
from training.config import GanConfig
from training.discriminator import filtered_resizing
from training.phases import Loss, Phase, lazy_adam


def logistic_loss(logits: torch.Tensor, real: bool) -> torch.Tensor:
    """softplus(-D) where the images should pass for `real`, as the generator's (non-saturating, Goodfellow et
    al. 2014) and D's real ones, else softplus(D). logits [N, 1] -> [N].
    """
    return torch.nn.functional.softplus(-logits if real else logits).squeeze(1)


def r1_penalty(real_logits: torch.Tensor, *fed: torch.Tensor) -> torch.Tensor:
    """Squared gradient norm of D at real images (Mescheder et al. 2018), summed over pixels and over all
    `fed` tensors.

    Args:
        real_logits: [N, 1]; fed: the tensors that the discriminator was given, after blur and augmentation,
            each [N, C, H, W].
    Returns: [N]. Differentiable in the discriminator's parameters (second order).
    """
    gradients = torch.autograd.grad(
        outputs=[real_logits.sum()], inputs=list(fed), create_graph=True, only_inputs=True
    )
    return sum(g.square().sum(dim=[1, 2, 3]) for g in gradients)  # type: ignore[return-value]


def density_l1(sigma: torch.Tensor) -> torch.Tensor:
    """Mean |sigma(x) - sigma(x + e)| of raw densities.

    Args:
        sigma: [N, 2P, 1], the points in the first half and their perturbed copies in the second.
    Returns: [N].
    """
    first, second = sigma.chunk(2, dim=1)
    return (first - second).abs().mean(dim=[1, 2])


def density_monotonic(sigma: torch.Tensor, detach_front: bool) -> torch.Tensor:
    """Mean relu(sigma(front) - sigma(behind)): density should not fall from front to back.

    Args:
        sigma: [N, 2P, 1], front points first, the points one voxel behind them second; detach_front: gradient
            to the points behind only.
    Returns: [N].
    """
    front, behind = sigma.chunk(2, dim=1)
    if detach_front:
        front = front.detach()
    return torch.relu(front - behind).mean(dim=[1, 2])


def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian-like blur exp2(-(k/sigma)^2), |k| <= floor(3 sigma), zero-padded; nothing below a third of a
    pixel.

    Args:
        image: [N, C, H, W]; sigma: pixels.
    Returns: as image. Differentiable in image.
    """
    radius = math.floor(sigma * 3)
    if radius <= 0:
        return image
    taps = torch.arange(-radius, radius + 1, device=image.device).div(sigma).square().neg().exp2()
    return upfirdn2d.filter2d(image, taps / taps.sum())


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What fades with the number of images seen."""

    blur_sigma: float
    swapping_prob: float | None
    neural_rendering_resolution: int


def schedule(config: GanConfig, cur_nimg: int) -> Schedule:
    """Blur, camera swapping and rendering resolution after `cur_nimg` images."""

    def progress(kimg: float) -> float:
        return min(cur_nimg / (kimg * 1e3), 1.0) if kimg > 0 else 1.0

    sigma = (
        max(1 - progress(config.blur_fade_kimg), 0.0) * config.blur_init_sigma
        if config.blur_fade_kimg > 0
        else 0.0
    )
    swap = None
    if config.gen_pose_cond:
        alpha = progress(config.gpc_reg_fade_kimg)
        swap = (1 - alpha) + alpha * config.gpc_reg_prob
    resolution = config.nrr_initial
    if config.nrr_final is not None:
        alpha = progress(config.nrr_fade_kimg)
        resolution = round(resolution * (1 - alpha) + config.nrr_final * alpha)
    return Schedule(sigma, swap, resolution)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one phase."""

    real_img: torch.Tensor  # [N, 3, R, R] in [-1, 1]
    real_c: torch.Tensor  # [N, K]
    gen_z: torch.Tensor  # [N, Z]
    gen_c: torch.Tensor  # [N, K]
    cur_nimg: int
    # [N, K] camera of the sample before, for swapping; None = of the neighbour in this batch
    swap_c: torch.Tensor | None = None
    # places of the samples in the whole batch, of which ranks and rounds have parts; None = all of it
    rows: Sequence[int] | None = None

    @property
    def places(self) -> torch.Tensor:
        """Places [N] of the samples among all that the run has seen."""
        rows = range(len(self.gen_z)) if self.rows is None else self.rows
        return self.cur_nimg + torch.as_tensor(rows, device=self.gen_z.device)

    @property
    def neighbour_c(self) -> torch.Tensor:
        """The camera [N, K] that each sample's generator is conditioned on where cameras are swapped."""
        return torch.roll(self.gen_c, 1, 0) if self.swap_c is None else self.swap_c


class GanPhases:
    """Loss terms of Gmain, Greg, Dmain and Dreg for one generator, discriminator and augmentation.

    Deviates from EG3D: style mixing works in every phase (EG3D's density phase refers to names that do not
    exist); real images and labels are never modified in place; `reg_type` values that EG3D accepts without
    effect are errors.
    """

    def __init__(self, G: Any, D: Any, config: GanConfig, augment_pipe: torch.nn.Module | None = None):
        self.G = G
        self.D = D
        self.config = config
        self.augment_pipe = augment_pipe

    def ws(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        swap: torch.Tensor | None,
        update_emas: bool = False,
        other_c: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ws [N, L, W] of latents z [N, Z] under cameras c [N, K], the conditioning camera swapped where
        `swap` ([N, 1] or []) is true.

        The swapped camera is `other_c` [N, K], by default the neighbour's.
        """
        other_c = torch.roll(c, 1, 0) if other_c is None else other_c
        cond = torch.zeros_like(c) if swap is None else torch.where(swap, other_c, c)
        ws = self.G.mapping(z, cond, update_emas=update_emas)
        if self.config.style_mixing_prob > 0:
            length = ws.shape[1]
            cutoff = torch.randint(1, length, [], device=ws.device)
            cutoff = torch.where(
                torch.rand([], device=ws.device) < self.config.style_mixing_prob, cutoff, length
            )
            # under the true camera, as EG3D does
            other = self.G.mapping(torch.randn_like(z), c, update_emas=False)
            keep = torch.arange(length, device=ws.device)[None, :, None] < cutoff
            ws = torch.where(keep, ws, other)
        return ws

    def run_G(self, batch: Batch, sched: Schedule, update_emas: bool = False) -> dict[str, torch.Tensor]:
        """Fake images from the batch's latents, seen from its cameras."""
        swap = None
        c = batch.gen_c
        if sched.swapping_prob is not None:
            swap = torch.rand([c.shape[0], 1], device=c.device) < sched.swapping_prob
        ws = self.ws(batch.gen_z, c, swap, update_emas, batch.neighbour_c)
        with self._mixed(c.device):
            img = self.G.synthesis(ws, c, neural_rendering_resolution=sched.neural_rendering_resolution)
        return {name: x.float() for name, x in img.items()}

    def _mixed(self, device: torch.device, on: bool = True):
        """Autocast to bfloat16 where the settings ask for it."""
        return (
            torch.autocast(device.type, torch.bfloat16)
            if self.config.amp == "bf16" and on
            else contextlib.nullcontext()
        )

    def run_D(
        self, img: dict[str, torch.Tensor], c: torch.Tensor, blur_sigma: float, mixed: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [N, 1] and the tensors that were fed to D (blurred, augmented), for R1; `mixed` allows
        reduced precision.
        """
        image = blur(img["image"], blur_sigma)
        raw = img["image_raw"]
        if self.augment_pipe is not None:
            size = image.shape[-1]
            both = self.augment_pipe(torch.cat([image, filtered_resizing(raw, size)], dim=1))
            image = both[:, :3]
            raw = filtered_resizing(both[:, 3:], raw.shape[-1])
        with self._mixed(c.device, mixed):
            logits = self.D({"image": image, "image_raw": raw}, c)
        return logits.float(), ([image, raw] if self.config.dual_discrimination else [image])

    def _real(self, batch: Batch, sched: Schedule, requires_grad: bool) -> dict[str, torch.Tensor]:
        raw = filtered_resizing(batch.real_img, sched.neural_rendering_resolution, self.config.filter_mode)
        raw = blur(raw, sched.blur_sigma)  # the fake raw image is not blurred: EG3D's behaviour, kept
        return {
            "image": batch.real_img.detach().requires_grad_(requires_grad),
            "image_raw": raw.detach().requires_grad_(requires_grad),
        }

    def g_main(self, batch: Batch) -> Iterator[Loss]:
        """Non-saturating generator loss."""
        sched = schedule(self.config, batch.cur_nimg)
        logits, _ = self.run_D(self.run_G(batch, sched), batch.gen_c, sched.blur_sigma)
        loss = logistic_loss(logits, real=True)
        yield Loss(loss, {"Loss/scores/fake": logits, "Loss/signs/fake": logits.sign(), "Loss/G/loss": loss})

    def g_reg(self, batch: Batch) -> Iterator[Loss]:
        """Density regularisation at random points of [-1, 1]^3 (not scaled by box_warp: EG3D's behaviour,
        kept).
        """
        config = self.config
        box_warp = self.G.rendering_kwargs["box_warp"]
        ws = self._density_ws(batch)
        l1_distance = config.density_reg_p_dist
        if config.reg_type.startswith("monotonic"):
            l1_distance = box_warp / 256
            front = torch.rand([ws.shape[0], 2000, 3], device=ws.device) * 2 - 1
            behind = front + torch.tensor([0.0, 0.0, -box_warp / 256], device=ws.device)
            loss = density_monotonic(
                self._sigma_raw(ws, front, behind), detach_front=config.reg_type == "monotonic-detach"
            )
            yield Loss(loss * 10, {"density_reg_monotonic_unscaled": loss})
            ws = self._density_ws(batch)  # the graph of the first is gone once its loss has run backward
        points = torch.rand([ws.shape[0], 1000, 3], device=ws.device) * 2 - 1
        perturbed = points + torch.randn_like(points) * l1_distance
        loss = density_l1(self._sigma_raw(ws, points, perturbed))
        yield Loss(loss * config.density_reg, {"density_reg_l1_unscaled": loss})

    def _density_ws(self, batch: Batch) -> torch.Tensor:
        sched = schedule(self.config, batch.cur_nimg)
        swap = None
        if sched.swapping_prob is not None:  # one draw for the whole batch, unlike the main phases
            swap = torch.rand([], device=batch.gen_c.device) < sched.swapping_prob
        return self.ws(batch.gen_z, batch.gen_c, swap, other_c=batch.neighbour_c)

    def _sigma_raw(self, ws: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        points = torch.cat([first, second], dim=1)
        # unused by the decoder; drawn so that the random sequence is EG3D's
        directions = torch.randn_like(points)
        return self.G.sample_mixed(points, directions, ws, update_emas=False, sigma_only=True)["sigma"]

    def d_main(self, batch: Batch) -> Iterator[Loss]:
        """Logistic discriminator loss, fakes first; each half runs backward on its own."""
        sched = schedule(self.config, batch.cur_nimg)
        with torch.no_grad():
            fake = self.run_G(batch, sched, update_emas=True)
        logits, _ = self.run_D(fake, batch.gen_c, sched.blur_sigma)
        fake_loss = logistic_loss(logits, real=False)
        yield Loss(fake_loss, {"Loss/scores/fake": logits, "Loss/signs/fake": logits.sign()})
        logits, _ = self.run_D(self._real(batch, sched, requires_grad=False), batch.real_c, sched.blur_sigma)
        loss = logistic_loss(logits, real=True)
        stats = {
            "Loss/scores/real": logits,
            "Loss/signs/real": logits.sign(),
            "Loss/D/loss": fake_loss.detach() + loss,
        }
        yield Loss(loss, stats)

    def d_reg(self, batch: Batch) -> Iterator[Loss]:
        """R1, taken at the tensors that D is fed."""
        sched = schedule(self.config, batch.cur_nimg)
        logits, fed = self.run_D(
            self._real(batch, sched, requires_grad=True), batch.real_c, sched.blur_sigma, mixed=False
        )
        penalty = r1_penalty(logits, *fed)
        loss = penalty * (self.config.gamma / 2)
        stats = {
            "Loss/scores/real": logits,
            "Loss/signs/real": logits.sign(),
            "Loss/r1_penalty": penalty,
            "Loss/D/reg": loss,
        }
        yield Loss(loss, stats)

    def phases(self) -> list[Phase]:
        """Gmain, Greg, Dmain, Dreg; without density regularisation there is no Greg and no correction of G's
        optimizer.
        """
        config = self.config
        G = self.G
        D = self.D
        every = config.density_reg_every if config.density_reg > 0 else None
        G_adam = lazy_adam(G, config.glr, every)
        D_adam = lazy_adam(D, config.dlr, config.d_reg_interval)
        phases = [Phase(name="Gmain" if every else "Gboth", module=G, optimizer=G_adam, losses=self.g_main)]
        if every:
            phases.append(
                Phase(name="Greg", module=G, optimizer=G_adam, losses=self.g_reg, interval=every, gain=every)
            )
        every = config.d_reg_interval
        phases.append(Phase(name="Dmain", module=D, optimizer=D_adam, losses=self.d_main))
        phases.append(
            Phase(name="Dreg", module=D, optimizer=D_adam, losses=self.d_reg, interval=every, gain=every)
        )
        return phases
