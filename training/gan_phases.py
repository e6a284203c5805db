"""The four phases of EG3D's adversarial training: Gmain, Greg, Dmain, Dreg.

Each phase is a generator that yields named, unreduced losses. The loss terms themselves are pure functions of
tensors:

    Gmain  softplus(-D(G(z)))                          non-saturating logistic loss (Goodfellow et al. 2014)
    Greg   mean |sigma(x) - sigma(x + e)|              density regularisation (Chan et al. 2022, EG3D)
    Dmain  softplus(D(G(z))) + softplus(-D(real))      logistic loss
    Dreg   gamma / 2 * |grad D(real)|^2                R1 penalty (Mescheder et al. 2018)

Shapes: N batch, Z z_dim, K c_dim, C channels, R final and r raw resolution, P points, L number of ws, W
w_dim.
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
    """Return the logistic loss: softplus(-D) if the images should be classified as real, else softplus(D).

    With `real` this is D's loss for real images and G's non-saturating loss for its own images (Goodfellow et
    al. 2014).

    Args:
        logits: D, [N, 1].
    Returns: [N].
    """
    return torch.nn.functional.softplus(-logits if real else logits).squeeze(1)  # [N, 1] -> [N]


def r1_penalty(real_logits: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Return the squared gradient norm of D at real images (R1, Mescheder et al. 2018).

    Args:
        real_logits: [N, 1].
        inputs: tensors that the discriminator received, after blur and augmentation, each [N, C, H, W]. The
            norm is summed over their pixels and over all of them.
    Returns: [N]. Differentiable in the discriminator's parameters (second order).
    """
    # The sum over samples is legitimate: a sample's logit depends on its own image, apart from D's minibatch
    # statistics. `create_graph` makes the gradient itself differentiable, which R1 needs.
    gradients = torch.autograd.grad(
        outputs=[real_logits.sum()], inputs=list(inputs), create_graph=True, only_inputs=True
    )
    return sum(g.square().sum(dim=[1, 2, 3]) for g in gradients)  # type: ignore[return-value]


def density_l1(sigma: torch.Tensor) -> torch.Tensor:
    """Return the mean |sigma(x) - sigma(x + e)| of raw densities.

    Args:
        sigma: [N, 2P, 1], the points in the first half and their perturbed copies in the second.
    Returns: [N].
    """
    first, second = sigma.chunk(2, dim=1)
    return (first - second).abs().mean(dim=[1, 2])


def density_monotonic(sigma: torch.Tensor, detach_front: bool) -> torch.Tensor:
    """Return the mean relu(sigma(front) - sigma(rear)): the density should not fall from front to back.

    Args:
        sigma: [N, 2P, 1]. The front points come first, then the points one voxel further back.
        detach_front: give a gradient to the rear points only.
    Returns: [N].
    """
    front, rear = sigma.chunk(2, dim=1)
    if detach_front:
        # The only way to a smaller loss is then to fill the rear points, not to empty the front ones.
        front = front.detach()
    return torch.relu(front - rear).mean(dim=[1, 2])


def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur with the taps exp2(-(k / sigma)^2), |k| <= int(3 sigma), zero-padded.

    Below a third of a pixel the kernel is a single tap, and the image is returned unchanged.

    Args:
        image: [N, C, H, W].
        sigma: pixels.
    Returns: [N, C, H, W]. Differentiable in image.
    """
    radius = math.floor(sigma * 3)
    if radius <= 0:
        return image
    # exp2 instead of exp: sigma is the distance at which a tap falls to one half. EG3D has the same formula.
    taps = torch.arange(-radius, radius + 1, device=image.device).div(sigma).square().neg().exp2()
    return upfirdn2d.filter2d(image, taps / taps.sum())


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Settings that change with the number of images seen."""

    blur_sigma: float  # pixels, blur of D's inputs; 0: none
    swapping_prob: float | None  # of the conditioning camera; None: G has no camera conditioning
    neural_rendering_resolution: int  # pixels


def schedule(config: GanConfig, cur_nimg: int) -> Schedule:
    """Return blur, camera swapping and rendering resolution after `cur_nimg` images."""

    def progress(kimg: float) -> float:
        # A fade of length 0 is complete from the start.
        return min(cur_nimg / (kimg * 1e3), 1.0) if kimg > 0 else 1.0

    sigma = (
        max(1 - progress(config.blur_fade_kimg), 0.0) * config.blur_init_sigma
        if config.blur_fade_kimg > 0
        else 0.0
    )
    swap = None
    if config.gen_pose_cond:
        # The probability falls from 1 to gpc_reg_prob: at first G never learns the true camera, so that it
        # cannot tie the shape to it.
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
    gen_c: torch.Tensor  # [N, K] cameras from which the generated images are rendered
    cur_nimg: int
    # [N, K] camera of the previous sample of the whole batch, for swapping. None: take it from this batch.
    swap_c: torch.Tensor | None = None
    # Indices of the samples in the whole batch, of which ranks
    # and rounds have parts. None: it is the whole one.
    rows: Sequence[int] | None = None

    @property
    def places(self) -> torch.Tensor:
        """Running numbers [N] of the samples among all that the run has seen."""
        rows = range(len(self.gen_z)) if self.rows is None else self.rows
        return self.cur_nimg + torch.as_tensor(rows, device=self.gen_z.device)

    @property
    def neighbour_c(self) -> torch.Tensor:
        """Cameras [N, K] that the generator is conditioned on where cameras are swapped."""
        return torch.roll(self.gen_c, 1, 0) if self.swap_c is None else self.swap_c


class GanPhases:
    """Loss terms of Gmain, Greg, Dmain and Dreg for one generator, discriminator and augmentation.

    Deviates from EG3D in three points. Style mixing works in every phase (EG3D's density phase refers to
    names that do not exist). Real images and labels are never modified in place. Values of `reg_type` that
    EG3D accepts without effect are errors.
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
        """Map latents to ws, with the conditioning camera swapped for some samples.

        Args:
            z: [N, Z].
            c: [N, K] cameras.
            swap: [N, 1] or [], True where the camera is swapped. None: G is conditioned on zeros instead.
            update_emas: let the mapping network update its running mean of w.
            other_c: [N, K] cameras to swap in, by default those of the previous sample in the batch.
        Returns: [N, L, W].
        """
        other_c = torch.roll(c, 1, 0) if other_c is None else other_c
        # Without camera conditioning the label is zero, and still
        # [N, K], since the mapping network embeds it.
        cond = torch.zeros_like(c) if swap is None else torch.where(swap, other_c, c)
        ws = self.G.mapping(z, cond, update_emas=update_emas)
        if self.config.style_mixing_prob > 0:
            length = ws.shape[1]
            # One cutoff for the whole batch, as in StyleGAN2-ADA. `cutoff == length` keeps all ws: no mixing.
            cutoff = torch.randint(1, length, [], device=ws.device)
            cutoff = torch.where(
                torch.rand([], device=ws.device) < self.config.style_mixing_prob, cutoff, length
            )
            # The second ws see the true camera even where the first have a swapped one, as EG3D does.
            other = self.G.mapping(torch.randn_like(z), c, update_emas=False)
            # A mask instead of a slice: the cutoff stays on the device, without a synchronisation.
            keep = torch.arange(length, device=ws.device)[None, :, None] < cutoff  # [1, L, 1]
            ws = torch.where(keep, ws, other)
        return ws

    def run_G(self, batch: Batch, sched: Schedule, update_emas: bool = False) -> dict[str, torch.Tensor]:
        """Generate images from the batch's latents, rendered from its cameras. Returns images by name."""
        swap = None
        c = batch.gen_c
        if sched.swapping_prob is not None:
            # One random number per sample; the density phase draws one for the whole batch.
            swap = torch.rand([c.shape[0], 1], device=c.device) < sched.swapping_prob
        ws = self.ws(batch.gen_z, c, swap, update_emas, batch.neighbour_c)
        with self._mixed(c.device):
            img = self.G.synthesis(ws, c, neural_rendering_resolution=sched.neural_rendering_resolution)
        # Under autocast the images may be bfloat16; losses and augmentation need float32.
        return {name: x.float() for name, x in img.items()}

    def _mixed(self, device: torch.device, on: bool = True):
        """Return a context with autocast to bfloat16 if --amp=bf16 and `on`, else one that does nothing."""
        return (
            torch.autocast(device.type, torch.bfloat16)
            if self.config.amp == "bf16" and on
            else contextlib.nullcontext()
        )

    def run_D(
        self, img: dict[str, torch.Tensor], c: torch.Tensor, blur_sigma: float, mixed: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the discriminator, after blur and augmentation.

        Args:
            img: "image" [N, 3, R, R] and "image_raw" [N, 3, r, r].
            c: [N, K] cameras.
            blur_sigma: pixels; applies to "image".
            mixed: allow reduced precision.
        Returns: logits [N, 1], and the tensors that D received, for R1.
        """
        image = blur(img["image"], blur_sigma)
        raw = img["image_raw"]
        if self.augment_pipe is not None:
            # Both images are augmented as the six channels of one: they must get the same transform, because
            # D compares them.
            size = image.shape[-1]
            both = self.augment_pipe(torch.cat([image, filtered_resizing(raw, size)], dim=1))  # [N, 6, R, R]
            image = both[:, :3]
            raw = filtered_resizing(both[:, 3:], raw.shape[-1])
        with self._mixed(c.device, mixed):
            logits = self.D({"image": image, "image_raw": raw}, c)
        return logits.float(), ([image, raw] if self.config.dual_discrimination else [image])

    def _real(self, batch: Batch, sched: Schedule, requires_grad: bool) -> dict[str, torch.Tensor]:
        """Return the real images at both resolutions, as D's input."""
        raw = filtered_resizing(batch.real_img, sched.neural_rendering_resolution, self.config.filter_mode)
        # Only the real raw image is blurred here, the fake one never is. EG3D has this asymmetry; it is kept.
        raw = blur(raw, sched.blur_sigma)
        return {
            # detach() makes a new leaf per call, on which requires_grad
            # does not change the batch's own tensor.
            "image": batch.real_img.detach().requires_grad_(requires_grad),
            "image_raw": raw.detach().requires_grad_(requires_grad),
        }

    def g_main(self, batch: Batch) -> Iterator[Loss]:
        """Yield the non-saturating generator loss."""
        sched = schedule(self.config, batch.cur_nimg)
        logits, _ = self.run_D(self.run_G(batch, sched), batch.gen_c, sched.blur_sigma)
        loss = logistic_loss(logits, real=True)
        yield Loss(loss, {"Loss/scores/fake": logits, "Loss/signs/fake": logits.sign(), "Loss/G/loss": loss})

    def g_reg(self, batch: Batch) -> Iterator[Loss]:
        """Yield the density regularisation at random points of [-1, 1]^3.

        The points are not scaled by box_warp. EG3D samples the same cube; this is kept.
        """
        config = self.config
        box_warp = self.G.rendering_kwargs["box_warp"]
        ws = self._density_ws(batch)
        l1_distance = config.density_reg_p_dist
        if config.reg_type.startswith("monotonic"):
            l1_distance = box_warp / 256
            front = torch.rand([ws.shape[0], 2000, 3], device=ws.device) * 2 - 1  # [N, P, 3]
            # Frontal cameras look along -z, so this is one voxel of a 256^3 grid further back.
            rear = front + torch.tensor([0.0, 0.0, -box_warp / 256], device=ws.device)
            loss = density_monotonic(
                self._sigma_raw(ws, front, rear), detach_front=config.reg_type == "monotonic-detach"
            )
            yield Loss(loss * 10, {"density_reg_monotonic_unscaled": loss})  # factor 10: EG3D's
            # The loop has run backward on the first term by now, which
            # freed the graph of its ws. Compute new ones.
            ws = self._density_ws(batch)
        points = torch.rand([ws.shape[0], 1000, 3], device=ws.device) * 2 - 1
        perturbed = points + torch.randn_like(points) * l1_distance
        loss = density_l1(self._sigma_raw(ws, points, perturbed))
        yield Loss(loss * config.density_reg, {"density_reg_l1_unscaled": loss})

    def _density_ws(self, batch: Batch) -> torch.Tensor:
        """Return ws [N, L, W] for the density phase."""
        sched = schedule(self.config, batch.cur_nimg)
        swap = None
        if sched.swapping_prob is not None:
            # One random number for the whole batch, unlike in the main phases. EG3D does so.
            swap = torch.rand([], device=batch.gen_c.device) < sched.swapping_prob
        return self.ws(batch.gen_z, batch.gen_c, swap, other_c=batch.neighbour_c)

    def _sigma_raw(self, ws: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return raw densities [N, 2P, 1] at two sets of points [N, P, 3], in one call of the decoder."""
        points = torch.cat([first, second], dim=1)
        # The decoder does not use directions. They are drawn so that the random sequence is EG3D's.
        directions = torch.randn_like(points)
        return self.G.sample_mixed(points, directions, ws, update_emas=False, sigma_only=True)["sigma"]

    def d_main(self, batch: Batch) -> Iterator[Loss]:
        """Yield the logistic discriminator loss: that of fake images, then that of real ones.

        Each half runs backward on its own, so only one graph is in memory.
        """
        sched = schedule(self.config, batch.cur_nimg)
        # The running mean of w is updated here, where G runs without a graph, and not in Gmain, as in EG3D.
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
        """Yield the R1 penalty at the tensors that D receives."""
        sched = schedule(self.config, batch.cur_nimg)
        # Never in reduced precision: the penalty is a second derivative, and it is squared.
        logits, inputs = self.run_D(
            self._real(batch, sched, requires_grad=True), batch.real_c, sched.blur_sigma, mixed=False
        )
        penalty = r1_penalty(logits, *inputs)
        loss = penalty * (self.config.gamma / 2)
        stats = {
            "Loss/scores/real": logits,
            "Loss/signs/real": logits.sign(),
            "Loss/r1_penalty": penalty,
            "Loss/D/reg": loss,
        }
        yield Loss(loss, stats)

    def phases(self) -> list[Phase]:
        """Return the phases Gmain, Greg, Dmain, Dreg.

        Without density regularisation there is no Greg, Gmain is called Gboth, and G's optimiser has no
        correction for lazy regularisation.
        """
        config = self.config
        G = self.G
        D = self.D
        every = config.density_reg_every if config.density_reg > 0 else None
        # One Adam per network, shared by its main phase and its regularisation: the moments are common.
        G_adam = lazy_adam(G, config.glr, every)
        D_adam = lazy_adam(D, config.dlr, config.d_reg_interval)
        phases = [Phase(name="Gmain" if every else "Gboth", module=G, optimizer=G_adam, losses=self.g_main)]
        if every:
            # The gain makes up for the interval: on average the regulariser has its full weight.
            phases.append(
                Phase(name="Greg", module=G, optimizer=G_adam, losses=self.g_reg, interval=every, gain=every)
            )
        every = config.d_reg_interval
        phases.append(Phase(name="Dmain", module=D, optimizer=D_adam, losses=self.d_main))
        phases.append(
            Phase(name="Dreg", module=D, optimizer=D_adam, losses=self.d_reg, interval=every, gain=every)
        )
        return phases
