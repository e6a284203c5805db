"""The four phases of EG3D's adversarial training: Gmain, Greg, Dmain, Dreg.

Each phase is a generator function that yields unreduced losses. The loss terms themselves are pure functions
of tensors. G is the generator, D the discriminator, z a latent, sigma the raw density, x a random point and e
a small displacement:

    Gmain  softplus(-D(G(z)))                          non-saturating logistic loss (Goodfellow et al. 2014)
    Greg   mean |sigma(x) - sigma(x + e)|              density regularisation (Chan et al. 2022, EG3D)
    Dmain  softplus(D(G(z))) + softplus(-D(real))      logistic loss
    Dreg   gamma / 2 * |grad D(real)|^2                R1 penalty (Mescheder et al. 2018)

Shapes: N is the number of images in a batch, Z is z_dim, K is c_dim, C is the number of channels, R and r
are the numbers of pixels per edge of the final and the raw image, P is the number of points, L is num_ws,
W is w_dim.
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
    """Compute the logistic loss of D's logits (Goodfellow et al. 2014).

    Args:
        logits: logits of D [N, 1].
        real: True: softplus(-logits), the loss of D for real images, and the non-saturating loss of G for
            generated images. False: softplus(logits), the loss of D for generated images.
    Returns: loss [N].
    """
    return torch.nn.functional.softplus(-logits if real else logits).squeeze(1)  # [N, 1] -> [N]


def r1_penalty(real_logits: torch.Tensor, *discriminator_inputs: torch.Tensor) -> torch.Tensor:
    """Compute the squared norm of D's gradient at real images (R1 penalty, Mescheder et al. 2018).

    Differentiable in the parameters of D (second derivatives).

    Args:
        real_logits: logits of D for real images [N, 1].
        discriminator_inputs: tensors [N, C, H, W] that D received, after blur and augmentation. The squared
            gradients are summed over the pixels of all these tensors.
    Returns: penalty [N].
    """
    # The gradient of the sum over images contains the gradient of each image, because the logit of an
    # image depends only on this image, apart from D's minibatch statistics. With `create_graph`, the
    # gradient is differentiable.
    gradients = torch.autograd.grad(
        outputs=[real_logits.sum()], inputs=list(discriminator_inputs), create_graph=True, only_inputs=True
    )
    return sum(gradient.square().sum(dim=[1, 2, 3]) for gradient in gradients)  # type: ignore[return-value]


def density_l1(sigma: torch.Tensor) -> torch.Tensor:
    """Compute the mean absolute difference of raw densities at points and at nearby points.

    Args:
        sigma: raw densities [N, 2P, 1]. The first half belongs to P points, the second half to the nearby
            points in the same order.
    Returns: loss [N].
    """
    sigma_at_points, sigma_nearby = sigma.chunk(2, dim=1)
    return (sigma_at_points - sigma_nearby).abs().mean(dim=[1, 2])


def density_monotonic(sigma: torch.Tensor, detach_front: bool) -> torch.Tensor:
    """Compute a penalty for densities that decrease from front to back.

    The penalty is the mean of relu(front density - rear density).

    Args:
        sigma: raw densities [N, 2P, 1]. The first half belongs to P front points, the second half to the rear
            points behind them in the same order.
        detach_front: True: only the rear points get a gradient.
    Returns: loss [N].
    """
    front_sigma, rear_sigma = sigma.chunk(2, dim=1)
    if detach_front:
        # The loss can then decrease only by higher densities at the rear points, not by lower ones at
        # the front.
        front_sigma = front_sigma.detach()
    return torch.relu(front_sigma - rear_sigma).mean(dim=[1, 2])


def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur images with a Gaussian kernel, with zero padding. Differentiable in image.

    The kernel has the entries exp2(-(k / sigma)^2) for |k| <= int(3 sigma), divided by their sum. If sigma is
    less than a third of a pixel, the kernel has a single entry, and the image is returned unchanged.

    Args: image: images [N, C, H, W]; sigma: width of the kernel in pixels.
    Returns: images [N, C, H, W].
    """
    radius = math.floor(sigma * 3)
    if radius <= 0:
        return image
    # With exp2, as in EG3D, sigma is the distance at which the kernel decreases to one half.
    taps = torch.arange(-radius, radius + 1, device=image.device).div(sigma).square().neg().exp2()
    return upfirdn2d.filter2d(image, taps / taps.sum())


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Settings that change with the number of images that the run has used."""

    blur_sigma: float  # width of the blur of D's inputs, pixels; 0: no blur
    # Probability of a swapped conditioning camera; None: G has no camera conditioning.
    swapping_prob: float | None
    neural_rendering_resolution: int  # resolution of volume rendering, pixels per edge


def schedule(config: GanConfig, cur_nimg: int) -> Schedule:
    """Return the scheduled settings after `cur_nimg` images."""

    def completed_fraction(kimg: float) -> float:
        """Return the completed fraction, 0..1, of a fade with a length of `kimg` thousand images."""
        # A fade of length 0 is complete from the start.
        return min(cur_nimg / (kimg * 1e3), 1.0) if kimg > 0 else 1.0

    blur_sigma = (
        max(1 - completed_fraction(config.blur_fade_kimg), 0.0) * config.blur_init_sigma
        if config.blur_fade_kimg > 0
        else 0.0
    )
    swapping_prob = None
    if config.gen_pose_cond:
        # The probability falls from 1 to gpc_reg_prob. At first G is never conditioned on the camera of the
        # render, so that it cannot learn shapes that depend on this camera.
        alpha = completed_fraction(config.gpc_reg_fade_kimg)
        swapping_prob = (1 - alpha) + alpha * config.gpc_reg_prob
    rendering_resolution = config.nrr_initial
    if config.nrr_final is not None:
        alpha = completed_fraction(config.nrr_fade_kimg)
        rendering_resolution = round(rendering_resolution * (1 - alpha) + config.nrr_final * alpha)
    return Schedule(blur_sigma, swapping_prob, rendering_resolution)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one phase. They may be only some rows of the full batch of an iteration."""

    real_img: torch.Tensor  # real images [N, 3, R, R] in [-1, 1]
    real_c: torch.Tensor  # camera labels of the real images [N, K]
    gen_z: torch.Tensor  # latents of the generated images [N, Z]
    gen_c: torch.Tensor  # cameras from which the generated images are rendered [N, K]
    cur_nimg: int  # number of images before this iteration
    # Cameras [N, K] that replace swapped conditioning cameras: for each image the camera of the previous
    # image in the full batch. None: of the previous image in this batch.
    swap_c: torch.Tensor | None = None
    # Indices of the images in the full batch. None: this is the full batch.
    rows: Sequence[int] | None = None

    @property
    def places(self) -> torch.Tensor:
        """Indices [N] of the images among all images that the run uses, counted from 0."""
        row_indices = range(len(self.gen_z)) if self.rows is None else self.rows
        return self.cur_nimg + torch.as_tensor(row_indices, device=self.gen_z.device)

    @property
    def neighbour_c(self) -> torch.Tensor:
        """Cameras [N, K] that replace swapped conditioning cameras."""
        return torch.roll(self.gen_c, 1, 0) if self.swap_c is None else self.swap_c


class GanPhases:
    """The phases Gmain, Greg, Dmain and Dreg for one generator and one discriminator.

    Deviates: from EG3D in three points. Style mixing works in every phase (EG3D's density phase refers to
        names that do not exist). Real images and labels are never changed in place. Values of `reg_type` that
        have no effect in EG3D are errors.

    Args:
        G: generator.
        D: discriminator.
        config: settings of adversarial training.
        augment_pipe: augmentation of D's inputs, or None.
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
        is_swapped: torch.Tensor | None,
        update_emas: bool = False,
        other_c: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map latents to style vectors, which for some images are conditioned on the camera of another image.

        Args:
            z: latents [N, Z].
            c: cameras [N, K].
            is_swapped: True for images whose conditioning camera is replaced, [N, 1] or []. None: G is
                conditioned on zeros instead of cameras.
            update_emas: True: the mapping network updates its running mean of w.
            other_c: cameras [N, K] that replace swapped ones; None: the camera of the previous image in
                the batch.
        Returns: style vectors ws [N, L, W].
        """
        other_c = torch.roll(c, 1, 0) if other_c is None else other_c
        # Without camera conditioning, the mapping network still embeds a label [N, K], of zeros.
        conditioning = torch.zeros_like(c) if is_swapped is None else torch.where(is_swapped, other_c, c)
        ws = self.G.mapping(z, conditioning, update_emas=update_emas)
        if self.config.style_mixing_prob > 0:
            style_count = ws.shape[1]
            # One cutoff for the whole batch, as in StyleGAN2-ADA. With mixing_cutoff == style_count, no
            # style is mixed.
            mixing_cutoff = torch.randint(1, style_count, [], device=ws.device)
            mixing_cutoff = torch.where(
                torch.rand([], device=ws.device) < self.config.style_mixing_prob, mixing_cutoff, style_count
            )
            # As in EG3D, the second ws are always conditioned on the cameras c, also for swapped images.
            second_ws = self.G.mapping(torch.randn_like(z), c, update_emas=False)
            # [1, L, 1]. A mask, because a slice would need the value of the cutoff on the CPU.
            is_before_cutoff = torch.arange(style_count, device=ws.device)[None, :, None] < mixing_cutoff
            ws = torch.where(is_before_cutoff, ws, second_ws)
        return ws

    def run_G(self, batch: Batch, sched: Schedule, update_emas: bool = False) -> dict[str, torch.Tensor]:
        """Generate images from the latents of a batch, rendered from its cameras.

        Args:
            batch: latents and cameras.
            sched: scheduled settings.
            update_emas: True: the mapping network updates its running mean of w.
        Returns: the images of `TriPlaneGenerator.synthesis` by name, float32.
        """
        is_swapped = None
        c = batch.gen_c
        if sched.swapping_prob is not None:
            # One random number for each image, while the density phase draws one for the whole batch.
            is_swapped = torch.rand([c.shape[0], 1], device=c.device) < sched.swapping_prob
        ws = self.ws(batch.gen_z, c, is_swapped, update_emas, batch.neighbour_c)
        with self._mixed(c.device):
            images = self.G.synthesis(ws, c, neural_rendering_resolution=sched.neural_rendering_resolution)
        # Under autocast the images may be bfloat16, but losses and augmentation need float32.
        return {image_name: image.float() for image_name, image in images.items()}

    def _mixed(self, device: torch.device, is_allowed: bool = True):
        """Return a context with autocast to bfloat16 if --amp=bf16 is set and `is_allowed` is True.

        Otherwise the context has no effect.
        """
        return (
            torch.autocast(device.type, torch.bfloat16)
            if self.config.amp == "bf16" and is_allowed
            else contextlib.nullcontext()
        )

    def run_D(
        self, img: dict[str, torch.Tensor], c: torch.Tensor, blur_sigma: float, allows_mixed: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Blur and augment images, and run the discriminator.

        Args:
            img: images "image" [N, 3, R, R] and "image_raw" [N, 3, r, r] in [-1, 1].
            c: cameras [N, K].
            blur_sigma: width of the blur of "image", pixels; 0: no blur.
            allows_mixed: True: run D in bfloat16 if --amp=bf16 is set. False: always run it in float32.
        Returns: the logits [N, 1], and the list of the images that D received. The R1 penalty is the gradient
            of the logits with respect to these images.
        """
        image = blur(img["image"], blur_sigma)
        raw_image = img["image_raw"]
        if self.augment_pipe is not None:
            # Both images must get the same transform, because D compares them. They are therefore augmented
            # as one image with six channels.
            image_size = image.shape[-1]
            six_channels = torch.cat([image, filtered_resizing(raw_image, image_size)], dim=1)  # [N, 6, R, R]
            augmented_images = self.augment_pipe(six_channels)
            image = augmented_images[:, :3]
            raw_image = filtered_resizing(augmented_images[:, 3:], raw_image.shape[-1])
        with self._mixed(c.device, allows_mixed):
            logits = self.D({"image": image, "image_raw": raw_image}, c)
        return logits.float(), ([image, raw_image] if self.config.dual_discrimination else [image])

    def _real(self, batch: Batch, sched: Schedule, requires_grad: bool) -> dict[str, torch.Tensor]:
        """Return the real images at the final and at the raw resolution, as input of `run_D`.

        Args: requires_grad: True: the images get gradients, which the R1 penalty needs.
        """
        raw_images = filtered_resizing(
            batch.real_img, sched.neural_rendering_resolution, self.config.filter_mode
        )
        # As in EG3D, the raw real image is blurred here, but raw generated images are never blurred.
        raw_images = blur(raw_images, sched.blur_sigma)
        return {
            # requires_grad_ changes its tensor in place. detach() returns a new tensor, so that the tensors
            # of the batch are not changed.
            "image": batch.real_img.detach().requires_grad_(requires_grad),
            "image_raw": raw_images.detach().requires_grad_(requires_grad),
        }

    def g_main(self, batch: Batch) -> Iterator[Loss]:
        """Yield the non-saturating loss of the generator (phase Gmain)."""
        sched = schedule(self.config, batch.cur_nimg)
        logits, _ = self.run_D(self.run_G(batch, sched), batch.gen_c, sched.blur_sigma)
        loss = logistic_loss(logits, real=True)
        yield Loss(loss, {"Loss/scores/fake": logits, "Loss/signs/fake": logits.sign(), "Loss/G/loss": loss})

    def g_reg(self, batch: Batch) -> Iterator[Loss]:
        """Yield the losses of the density regularisation at random points (phase Greg).

        The points are uniform in [-1, 1]^3. As in EG3D, they are not scaled by box_warp.
        """
        config = self.config
        box_warp = self.G.rendering_kwargs["box_warp"]
        ws = self._density_ws(batch)
        l1_distance = config.density_reg_p_dist
        if config.reg_type.startswith("monotonic"):
            l1_distance = box_warp / 256
            front_points = torch.rand([ws.shape[0], 2000, 3], device=ws.device) * 2 - 1  # [N, P, 3]
            # Frontal cameras look along -z, so the rear points lie one voxel of a 256^3 grid behind the
            # front points.
            rear_points = front_points + torch.tensor([0.0, 0.0, -box_warp / 256], device=ws.device)
            loss = density_monotonic(
                self._sigma_raw(ws, front_points, rear_points),
                detach_front=config.reg_type == "monotonic-detach",
            )
            yield Loss(loss * 10, {"density_reg_monotonic_unscaled": loss})  # the factor 10 is EG3D's
            # After the yield, the loop has run the backward pass of this loss, which has freed the graph of
            # ws. Therefore ws is computed again.
            ws = self._density_ws(batch)
        points = torch.rand([ws.shape[0], 1000, 3], device=ws.device) * 2 - 1  # [N, P, 3]
        perturbed_points = points + torch.randn_like(points) * l1_distance
        loss = density_l1(self._sigma_raw(ws, points, perturbed_points))
        yield Loss(loss * config.density_reg, {"density_reg_l1_unscaled": loss})

    def _density_ws(self, batch: Batch) -> torch.Tensor:
        """Return ws [N, L, W] for the density phase."""
        sched = schedule(self.config, batch.cur_nimg)
        is_swapped = None
        if sched.swapping_prob is not None:
            # As in EG3D, one random number for the whole batch, unlike in the main phases.
            is_swapped = torch.rand([], device=batch.gen_c.device) < sched.swapping_prob
        return self.ws(batch.gen_z, batch.gen_c, is_swapped, other_c=batch.neighbour_c)

    def _sigma_raw(
        self, ws: torch.Tensor, first_points: torch.Tensor, second_points: torch.Tensor
    ) -> torch.Tensor:
        """Return the raw densities [N, 2P, 1] at two sets of points [N, P, 3].

        The densities of the first set come first. The decoder is called only once.
        """
        points = torch.cat([first_points, second_points], dim=1)
        # The decoder does not use directions. They are drawn, so that the sequence of random numbers
        # is EG3D's.
        directions = torch.randn_like(points)
        return self.G.sample_mixed(points, directions, ws, update_emas=False, sigma_only=True)["sigma"]

    def d_main(self, batch: Batch) -> Iterator[Loss]:
        """Yield the logistic loss of the discriminator (phase Dmain).

        The first loss is the loss for generated images, the second is the loss for real images. The loop runs
        the backward pass of each loss separately, so that only one graph is in memory.
        """
        sched = schedule(self.config, batch.cur_nimg)
        # As in EG3D, the running mean of w is updated in this phase, where G runs without a graph, not
        # in Gmain.
        with torch.no_grad():
            generated_images = self.run_G(batch, sched, update_emas=True)
        logits, _ = self.run_D(generated_images, batch.gen_c, sched.blur_sigma)
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
        """Yield the R1 penalty at the images that D receives (phase Dreg)."""
        sched = schedule(self.config, batch.cur_nimg)
        # Never in reduced precision, because squared gradients and their derivatives need float32.
        logits, discriminator_inputs = self.run_D(
            self._real(batch, sched, requires_grad=True), batch.real_c, sched.blur_sigma, allows_mixed=False
        )
        penalty = r1_penalty(logits, *discriminator_inputs)
        loss = penalty * (self.config.gamma / 2)
        stats = {
            "Loss/scores/real": logits,
            "Loss/signs/real": logits.sign(),
            "Loss/r1_penalty": penalty,
            "Loss/D/reg": loss,
        }
        yield Loss(loss, stats)

    def phases(self) -> list[Phase]:
        """Return the phases Gmain, Greg, Dmain and Dreg, with new optimisers.

        Without density regularisation there is no phase Greg. The phase Gmain is then called Gboth, and G's
        optimiser has no correction for lazy regularisation.
        """
        config = self.config
        G = self.G
        D = self.D
        g_interval = config.density_reg_every if config.density_reg > 0 else None
        d_interval = config.d_reg_interval
        # One optimiser for each network, which its main phase and its regularisation share, as in StyleGAN2.
        G_adam = lazy_adam(G, config.glr, g_interval)
        D_adam = lazy_adam(D, config.dlr, d_interval)
        # A regulariser is applied only every few iterations. The gain is equal to this interval, so that on
        # average the regulariser has its full weight.
        g_main = Phase(
            name="Gmain" if g_interval else "Gboth", module=G, optimizer=G_adam, losses=self.g_main
        )
        phases = [g_main]
        if g_interval:
            g_reg = Phase(
                name="Greg",
                module=G,
                optimizer=G_adam,
                losses=self.g_reg,
                interval=g_interval,
                gain=g_interval,
            )
            phases.append(g_reg)
        phases.append(Phase(name="Dmain", module=D, optimizer=D_adam, losses=self.d_main))
        d_reg = Phase(
            name="Dreg",
            module=D,
            optimizer=D_adam,
            losses=self.d_reg,
            interval=d_interval,
            gain=d_interval,
        )
        phases.append(d_reg)
        return phases
