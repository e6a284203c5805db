"""Rows of the benchmark that measure score distillation, renders of voxels, and updates of flows.

Shapes: A is the number of assets, N the number of voxels per edge.
"""

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rows import Case, Outcome, Row, Target
from eg3d_rlhf.generators.assets.grids import Voxels
from eg3d_rlhf.generators.assets.views import DISTANCE, FourViews, evenly_around, nearness
from eg3d_rlhf.models.lora import add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig, StructureFlow, StructureFlowConfig
from eg3d_rlhf.rewards import box_prompts
from eg3d_rlhf.rewards.meshes.model import EncoderOptions, RewardCS
from eg3d_rlhf.rewards.meshes.patches import MeshReader, PatchOptions
from eg3d_rlhf.rewards.meshes.surfaces import cube
from eg3d_rlhf.tuning.distill.config import Arm, DistillSettings, LoopConfig, SceneConfig
from eg3d_rlhf.tuning.distill.guidance.geometry import MeshGeometry
from eg3d_rlhf.tuning.distill.scene_boxes import bundled_scene
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowStage, SparseVoxels
from eg3d_rlhf.tuning.flow.families.folder import return_freed_memory
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import Updates
from eg3d_rlhf.tuning.flow.training.reference import AdapterOff
from eg3d_rlhf.tuning.flow.training.settings import TrainConfig
from eg3d_rlhf.tuning.flow.workspace.estimate import pairs_of
from training.distributed import SINGLE

ASSETS = 32
VIEWS = 4
_FROM = 40  # first of the timed distillation steps
_STEPS = 20  # number of timed distillation steps
# weight of the mesh reward: so small that it changes nothing, but not 0, with which the reward would not run
_NO_WEIGHT = 1e-25
# sizes of TRELLIS's flows
CHANNELS = 8  # channels of a latent
TOKENS = 77  # text tokens of CLIP
EMBEDDING = 768  # channels of a text token
ATTENTION_HEAD_CHANNELS = 64  # channels of an attention head


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the measured flow; the defaults are those of TRELLIS text-large."""

    stage: str  # "structure" (first stage) or "latent" (second stage)
    voxels: int = 8000  # number of voxels of each latent of the second stage
    blocks: int = 24  # number of transformer blocks
    width: int = 1024  # channels of a block, a multiple of ATTENTION_HEAD_CHANNELS
    grid: int = 0  # points per axis of the latent; 0: 16 for the first stage, 64 for the second
    device: str = "cpu"

    @property
    def points(self) -> int:
        """Return the number of points per axis of the latent."""
        return self.grid or (16 if self.stage == "structure" else 64)


class RandomConditions:
    """Replacement of a pipeline that only returns random conditioning tokens, which an update needs."""

    def conditioning(self, names, stage: str) -> torch.Tensor:
        """Return random tokens for each name, [number of names, TOKENS, EMBEDDING]."""
        # The i-th name gets the tokens of seed i, so that repeated calls return the same.
        return torch.stack(
            [
                torch.randn(TOKENS, EMBEDDING, generator=torch.Generator().manual_seed(name_index))
                for name_index in range(len(names))
            ]
        )


def build_stage(flow_size: Size) -> FlowStage:
    """Build a stage whose flow has random weights, on the device of `flow_size`."""
    common_settings: dict[str, Any] = dict(
        resolution=flow_size.points,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        model_channels=flow_size.width,
        cond_channels=EMBEDDING,
        num_blocks=flow_size.blocks,
        num_head_channels=ATTENTION_HEAD_CHANNELS,
        qk_rms_norm=True,
        use_checkpoint=True,
    )
    with torch.device(flow_size.device):
        # The second stage halves the resolution once before its transformer blocks.
        if flow_size.stage == "structure":
            model: torch.nn.Module = StructureFlow(StructureFlowConfig(patch_size=1, **common_settings))
        else:
            model = LatentFlow(
                LatentFlowConfig(patch_size=2, io_block_channels=(flow_size.width // 8,), **common_settings)
            )
    latents_class = SparseVoxels if flow_size.stage == "latent" else DenseGrid
    return FlowStage(
        name=flow_size.stage,
        model=model,
        latents=latents_class(channels=CHANNELS, resolution=flow_size.points),
    )


def _rays(edge: int, view_index: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sample points on the rays of an orthographic view, and their depths.

    Args:
        edge: number N of voxels along an axis.
        view_index: number of the view, 0 to 3.
        device: device of the returned tensors.
    Returns: world points [N, N, N, 3] (row, column, step away from the camera), and depths [N].
    """
    voxel_positions = torch.linspace(-0.5, 0.5, edge, device=device)  # positions of the voxels
    up, right, near = torch.meshgrid(-voxel_positions, voxel_positions, -voxel_positions, indexing="ij")
    x, z = ((right, near), (near, -right), (-right, -near), (-near, right))[view_index]
    return torch.stack([x, up, z], dim=-1), DISTANCE + voxel_positions


def _render_in_loops(voxels: Voxels) -> torch.Tensor:
    """Render colour and nearness by the direct method, [4 A, 4, N, N].

    Assets and views are rendered one after the other. Every ray has trilinear samples along its full length,
    which are composed by cumulative products of the transmittance.
    """
    edge = voxels.resolution
    images = []
    for asset_index in range(len(voxels)):
        volume = torch.cat([voxels.raw[asset_index, None], voxels.paint[asset_index]])[
            None
        ]  # [1, 4, N, N, N]
        for view_index in range(VIEWS):
            points, depths = _rays(edge, view_index, voxels.raw.device)
            # [4, N, N, N]
            volume_samples = F.grid_sample(
                volume, 2 * points[None], mode="bilinear", padding_mode="border", align_corners=True
            )[0]
            # opacity of each sample; softplus(. - 1) is the density
            alpha = 1 - torch.exp(-F.softplus(volume_samples[0] - 1) * voxels.pitch)
            transmittance = torch.cumprod(
                torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha[..., :-1]], dim=-1), dim=-1
            )
            sample_nearness = nearness(depths, DISTANCE - 0.5, DISTANCE + 0.5).expand_as(alpha)
            # [4, N, N, N]: colours and nearness
            sample_values = torch.cat([torch.sigmoid(volume_samples[1:]), sample_nearness[None]])
            images.append((alpha * transmittance * sample_values).sum(dim=-1))
    return torch.stack(images)


def four_views(device: str, tiny: bool, edge: int) -> Case:
    """Make the case of four views of voxels: images, and the gradients of shape and paint."""
    rng = torch.Generator().manual_seed(0)  # on the CPU, so that all devices get the same values
    voxels = Voxels(2 if tiny else ASSETS, 4 if tiny else edge)
    with torch.no_grad():
        for parameter in voxels.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) - 0.5)
    voxels.to(device)
    views = evenly_around(len(voxels), VIEWS, DISTANCE)
    background = torch.zeros(3, device=device)
    # random gradient of the images
    cotangent = torch.randn(VIEWS * len(voxels), 4, voxels.resolution, voxels.resolution, generator=rng).to(
        device
    )
    renderer = FourViews(voxels.resolution)

    def run(render) -> Outcome:
        images = render()
        shape, paint = torch.autograd.grad(images, [voxels.shape, voxels.paint], cotangent)
        return Outcome({"images": images.detach()}, {"shape": shape, "paint": paint})

    return Case(
        fast=lambda: run(lambda: renderer.render(voxels, views, background).images),
        reference=lambda: run(lambda: _render_in_loops(voxels)),
    )


def mesh_reward_steps(device: str, tiny: bool) -> Case:
    """Make the case of twenty steps of distillation with the mesh reward RewardCS and without it.

    The steps are those of the default problem later in a run, with one update of the meshes. The "fast" path
    is with the reward, the "reference" without it, so the ratio is 1 / overhead of the reward. The weight of
    the reward is too small to change an asset, so both paths compute the same.
    """
    torch.manual_seed(0)
    reward = RewardCS(
        PatchOptions(patches=32, faces=16), EncoderOptions(faces=16, width=48, depth=2), resolution=15
    )
    reward.to(device).eval().requires_grad_(False)
    distill_settings = DistillSettings(
        prompts=tuple(prompt.text for prompt in box_prompts.PROMPTS),
        arms=("sds",),
        scene=SceneConfig(assets=box_prompts.SEEDS),
        loop=LoopConfig(batch=4) if tiny else LoopConfig(),
        guidance={"geometry_weight": _NO_WEIGHT, "geometry_weight_from": _NO_WEIGHT},
    )
    scene = replace(
        bundled_scene(distill_settings, torch.device(device)),
        geometry=lambda: MeshGeometry(MeshReader(cube(reward.resolution).to(device), reward.patches), reward),
    )
    distillation_by_arm = {
        arm_name: scene.distillation(distill_settings, Arm.parse(arm_name), 0)
        for arm_name in ("sds", "sds+geometry")
    }
    # The state before the timed steps, to which `prepare` returns before every call.
    initial_states = {}
    for arm_name, distillation in distillation_by_arm.items():
        for step in range(_FROM - 20, _FROM):
            distillation.step(step)
        initial_states[arm_name] = copy.deepcopy(distillation.state())

    def prepare() -> None:
        for arm_name, distillation in distillation_by_arm.items():
            distillation.load(*copy.deepcopy(initial_states[arm_name]))

    def run(arm_name: str) -> Outcome:
        for step in range(_FROM, _FROM + _STEPS):
            distillation_by_arm[arm_name].step(step)
        return Outcome(
            {
                name: parameter.detach().clone()
                for name, parameter in distillation_by_arm[arm_name].asset.named_parameters()
            }
        )

    return Case(fast=lambda: run("sds+geometry"), reference=lambda: run("sds"), prepare=prepare)


ROWS = [
    *(
        Row(
            name=f"voxels {n}^3, {ASSETS} assets x {VIEWS} views, forward + backward",
            size="bundled",
            seconds=seconds,
            make=functools.partial(four_views, edge=n),
            target=Target(at_least=3, aim=6),
        )
        for n, seconds in ((16, 0.4), (24, 1.2))
    ),
    Row(
        name="twenty steps of distillation, with RewardCS against without",
        size="bundled",
        seconds=1,
        make=mesh_reward_steps,
        cpu_only=True,
        target=Target(at_least=1 / 1.5, aim=0.8),
    ),
]


# One DPO update of TRELLIS's flows on a pair. The flows have the width and the tokens of the text-large
# models, but only a twelfth of their blocks.

BLOCKS = 2  # instead of 24


def dpo_update(device: str, tiny: bool, stage_name: str) -> Case:
    """Make the case of a DPO update of a flow.

    Compared are the errors of the pair and the gradients of the adapters. The reference computes as published
    training code does: policy and reference network one after the other, activation checkpointing of every
    block, and attention and matrix products by torch.
    """
    return_freed_memory()
    flow_size = Size(stage=stage_name, blocks=BLOCKS, device=device)
    if tiny:
        flow_size = replace(flow_size, width=64, grid=8, voxels=60)
    torch.manual_seed(0)
    stage = build_stage(flow_size)
    add_lora(stage.model, LoraConfig(), 0)
    adapters = lora_parameters(stage.model)
    with torch.no_grad():
        for parameter in adapters:  # not zero, as later in a training
            parameter += 0.01 * torch.randn_like(parameter)
    config = TrainConfig(batch=1)
    pairs = pairs_of(stage, 1, flow_size.voxels)
    conditioned_stage = ConditionedStage(stage, RandomConditions())
    updates = Updates(conditioned_stage, pairs, config, stage.model, AdapterOff(stage.model), SINGLE)
    sampled_pairs = updates._draw(pairs, 0)

    def prepare() -> None:
        for parameter in adapters:
            parameter.grad = None

    def run() -> Outcome:
        _, loss, preferred_error, rejected_error = updates._pass(sampled_pairs)[:4].unbind()
        margin = -loss.expm1().log() / config.dpo.beta  # inverts loss = -log sigmoid(beta * margin)
        outputs = {"preferred error": preferred_error, "rejected error": rejected_error, "margin": margin}
        return Outcome(
            outputs,
            {
                f"adapter {index}": parameter.grad
                for index, parameter in enumerate(adapters)
                if parameter.grad is not None
            },
        )

    return Case(fast=run, prepare=prepare)


ROWS += [
    Row(
        name=f"TRELLIS {stage} flow, one DPO update",
        size="full",
        make=functools.partial(dpo_update, stage_name=stage),
        seconds=seconds,
        meter_in_round=True,
        target=Target(at_least=1.5, aim=2.5),
    )
    for stage, seconds in (("structure", 25), ("latent", 20))
]
