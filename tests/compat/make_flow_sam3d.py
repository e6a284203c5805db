"""Write SAM 3D Objects' values by this project's own code, with other sizes and options; see make_set."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn

from eg3d_rlhf.models.dino import DinoConfig
from eg3d_rlhf.models.image_preprocessing import object_inputs
from eg3d_rlhf.models.lora import adapters_off, lora_parameters
from eg3d_rlhf.models.sam3d import SHAPE, Embedder, ImageEncoder, PointConfig, PointPatches
from eg3d_rlhf.models.sparse import NamedBatch, SparseBatch, feats_of
from eg3d_rlhf.models.trellis.autoencoders import (
    GaussianDecoder,
    GaussianDecoderConfig,
    StructureDecoder,
    StructureVAEConfig,
)
from eg3d_rlhf.tuning.flow.base.sampling import times, trajectory
from eg3d_rlhf.tuning.flow.families import sam3d as family
from eg3d_rlhf.tuning.flow.families import sam3d_files as files
from eg3d_rlhf.tuning.flow.families import sam3d_pose as pose
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, pair_loss
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.compat.making import Maker, as_the_references, norm_of, on
from tests.models.published_names import published

HERE = "sam3d_objects"
WIDTH = 40  # of a condition
SIZES = {"rotation": (1, 6), "scale": (1, 3), "translation": (1, 3), "translation_scale": (1, 1)}
CASES = {
    "of_steps": {
        "generator": "ShortCut",
        "rotation": "6drotation_normalized",
        "side": 3,
        "weights": {"shape": 1.0, "scale": 0.5},
        "pipeline": {"downsample_ss_dist": 2, "ss_cfg_interval": [100, 700], "ss_inference_steps": 9},
        "pictures": [(26, 31, "soft"), (40, 22, "hard")],
        "steps": {"cfg": {"steps": 3, "rescale_t": 2.0, "strength": 1.5, "interval": [0, 400]}},
    },
    "plain": {
        "generator": "FlowMatching",
        "rotation": "6drotation",
        "side": 4,
        "weights": {},
        "pipeline": {"slat_cfg_strength": 2.5, "ss_rescale_t": 1.5, "pose_decoder_name": "ApparentSize"},
        "pictures": [],
        "steps": {
            "off": {"steps": 4, "rescale_t": 1.0, "strength": 0, "interval": [0, 500]},
            "wide": {"steps": 2, "rescale_t": 3.0, "strength": 4.0, "interval": [250, 1000]},
        },
    },
}


def make(root: Path, seed: int) -> None:
    """Write a network of steps with all values, and one without steps, adapters, pictures and a weighted
    loss.

    Tables are left out.
    """
    with as_the_references():
        for number, (name, said) in enumerate(CASES.items()):
            write_case(Maker(seed + 90 + number), root / "flow_sam3d" / name, said)


def write_case(m: Maker, folder: Path, said: dict) -> None:
    root = folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    quoted = configs(said)
    write_files(m, root, quoted)
    file = files.read_pipeline(root)
    flows = {stage: files.load_flow(generator, torch.float32) for stage, generator in file.generators.items()}
    pipeline = family.Sam3dPipeline(file, flows, None, lambda part: files.load_part(file, part))
    stages = {stage.name: stage for stage in pipeline.stages}
    facts = {
        "case": folder.name,
        "seed": m.seed,
        "root": "checkpoints",
        "config": quoted,
        "pictures": [kind for *_, kind in said["pictures"]],
        "pose_decoders": list(pose.DECODERS),
        "blocks_of": {"sample": 0},
        "ss_samplings": said["steps"],
        "slat_samplings": said["steps"],
    }
    for short, stage in zip(("ss", "slat"), stages.values(), strict=True):
        velocities(m, short, stage)
        path_values(m, short, stage, file.generators[stage.name].weights)
        trajectories(m, short, stage, said["steps"])
    want = replace(file.sampling["structure"], steps=6)
    m.put(ss_times_pipeline_t=1 - torch.tensor(times(want)).double())
    if file.generators["structure"].config.is_shortcut_model:
        two_steps(m, stages["structure"])
    with torch.no_grad():
        decoders(m, pipeline, file)
        poses(m)
        pictures(m, file, said["pictures"])
    if said["pictures"]:
        facts["adapter"] = "adapter"
        adapted(m, stages["structure"], folder / "adapter")
    (folder / "case.json").write_text(json.dumps(facts, indent=1))
    m.write(folder / "values.npz")


# The files.


def configs(said: dict) -> dict:
    """Return the contents of the YAML files by part."""
    latents = {said["rotation"] if name == "rotation" else name: size for name, size in SIZES.items()}
    mapping = {
        name: {"in_channels": channels, "pos_embedder": {"token_len": tokens}}
        for name, (tokens, channels) in latents.items()
    }
    mapping[SHAPE] = {"in_channels": 5, "pos_embedder": {"resolution": said["side"], "patch_size": 1}}
    shared = {"cond_channels": WIDTH, "force_zeros_cond": True, "num_heads": 2, "mlp_ratio": 2}
    structure = shared | {
        "_target_": f"{HERE}.SparseStructureFlowTdfyWrapper",
        "latent_mapping": mapping,
        "latent_share_transformer": {"pose": list(latents)},
        "model_channels": 16,
        "num_blocks": 2,
        "qk_rms_norm": True,
        "is_shortcut_model": said["generator"] == "ShortCut",
    }
    voxels = shared | {
        "_target_": f"{HERE}.SLatFlowModelTdfyWrapper",
        "resolution": 6,
        "in_channels": 5,
        "out_channels": 5,
        "patch_size": 2,
        "model_channels": 24,
        "num_blocks": 1,
        "num_io_res_blocks": 2,
        "io_block_channels": [8],
        "pe_mode": "ape",
    }
    weights = dict.fromkeys((*latents, SHAPE), 0.0) | said["weights"] if said["weights"] else None
    return {
        "pipeline": pipeline_yaml(said),
        "ss_generator": generator_yaml(said["generator"], structure, weights, maps=True),
        "slat_generator": generator_yaml("FlowMatching", voxels, None, maps=False),
        "ss_decoder": {"_target_": f"{HERE}.Decoder", "out_channels": 1, "latent_channels": 5}
        | {"num_res_blocks": 1, "num_res_blocks_middle": 1, "channels": [8, 4]},
        "slat_decoder_gs": gaussians_yaml(),
    }


def generator_yaml(kind: str, network: dict, weights: dict | None, *, maps: bool) -> dict:
    shown = [["image", "cropped"], ["rgb_image", "full"]]
    encoders = [[{"_target_": f"{HERE}.Dino", "input_size": 28, "prenorm_features": not maps}, shown]]
    if maps:
        points = {"input_size": 12, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "remap_output": "sinh"}
        told = [["pointmap", "cropped"], ["rgb_pointmap", "full"]]
        encoders.append([{"_target_": f"{HERE}.PointPatchEmbed", **points}, told])
    flow = {
        "_target_": f"{HERE}.{kind}",
        "time_scale": 900.0,
        "sigma_min": 0.0,
        "training_time_sampler_fn": {"_target_": f"{HERE}.lognorm_sampler", "mean": -0.5, "std": 1.2},
        "reverse_fn": {
            "_target_": f"{HERE}.ClassifierFreeGuidance",
            "unconditional_handling": "add_flag",
            "backbone": network,
        },
    }
    if weights:
        flow["loss_weights"] = weights
    embedder = {
        "_target_": f"{HERE}.EmbedderFuser",
        "embedder_list": encoders,
        "use_pos_embedding": "learned",
    }
    return {"module": {"condition_embedder": {"backbone": embedder}, "generator": {"backbone": flow}}}


def pipeline_yaml(said: dict) -> dict:
    square = {"_target_": f"{HERE}.pad_to_square_centered"}
    cut = {"_target_": f"{HERE}.crop_around_mask_with_padding", "box_size_factor": 1.5, "padding_factor": 0.1}

    def transform(**more) -> dict:
        return {"transforms": [square, {"_target_": "torchvision.transforms.Resize", "size": 24, **more}]}

    common = {"img_transform": transform(), "mask_transform": transform(interpolation=0)}
    content = {"_target_": f"{HERE}.InferencePipelinePointMap", "slat_mean": [0.1, -1.0, 0.5, 2.0, 0.0]}
    content |= {f"{part}_config_path": f"{part}.yaml" for part in files.PARTS.values()}
    content |= {f"{part}_ckpt_path": f"{part}.ckpt" for part in files.PARTS.values()}
    content["slat_std"] = [1.5, 0.5, 2.0, 1.0, 0.8]
    content["ss_preprocessor"] = common | {
        "pointmap_transform": transform(interpolation=0),
        "img_mask_pointmap_joint_transform": [{"_target_": f"{HERE}.resize_all_to_same_size"}, cut],
        "normalize_pointmap": True,
        "pointmap_normalizer": {"_target_": f"{HERE}.ObjectCentricSSI", "use_scene_scale": False},
    }
    content["slat_preprocessor"] = common | {"img_mask_joint_transform": [cut]}
    return content | said["pipeline"]


def gaussians_yaml() -> dict:
    rates = {"_xyz": 1.0, "_features_dc": 0.5, "_opacity": 1.0, "_scaling": 2.0, "_rotation": 0.1}
    form = {"lr": rates, "perturb_offset": True, "voxel_size": 1.1, "num_gaussians": 2, "scaling_bias": 0.003}
    form |= {"2d_filter_kernel_size": 0.1, "3d_filter_kernel_size": 0.002, "opacity_bias": 0.3}
    form["scaling_activation"] = "softplus"
    sizes = {"resolution": 6, "model_channels": 24, "latent_channels": 5, "num_blocks": 2, "num_heads": 3}
    sizes |= {"mlp_ratio": 2, "attn_mode": "swin", "window_size": 3}
    return {"_target_": f"{HERE}.SLatGaussianDecoderTdfyWrapper", **sizes, "representation_config": form}


def embedder_of(content: dict) -> Embedder:
    """Build the embedder that a generator's file describes, with a tiny DINOv2."""
    encoders = []
    for entry, inputs in content["module"]["condition_embedder"]["backbone"]["embedder_list"]:
        named = [tuple(one) for one in inputs]
        if entry["_target_"].endswith("Dino"):
            dino = DinoConfig(
                hidden_size=64,
                num_hidden_layers=1,
                num_attention_heads=1,
                mlp_ratio=0.5,
                image_size=21,
                patch_size=7,
                num_register_tokens=2,
                shown=28,
            )
            encoders.append((ImageEncoder(dino, 28, entry["prenorm_features"]), 64, named))
        else:
            known = {name: value for name, value in entry.items() if name != "_target_"}
            encoders.append((PointPatches(PointConfig(**known)), known["embed_dim"], named))
    return Embedder(encoders, [24] * len(encoders), WIDTH, True)


def write_files(m: Maker, root: Path, quoted: dict) -> None:
    for name, content in quoted.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    for part in files.PARTS.values():
        (root / f"{part}.ckpt").touch()
    for stage, generator in files.read_pipeline(root).generators.items():
        part = files.PARTS[stage]
        flow = m.fill(files.network_of(generator.config)(generator.config))
        if stage == files.STRUCTURE:
            for layers in flow.latent_mapping.values():
                # Errors are measured in units of the largest output: it must not be small by chance.
                layers.out_layer.bias.detach().add_(3)
        state = {files.FLOW + name: tensor for name, tensor in flow.state_dict().items()}
        embedder = m.fill(embedder_of(quoted[part]))
        tensors = embedder.state_dict()
        for number, encoder in enumerate(embedder.module_list):
            if isinstance(encoder, ImageEncoder):
                tensors = published(tensors, f"module_list.{number}.backbone.")
        state |= {files.EMBEDDERS[0] + name: tensor for name, tensor in tensors.items()}
        torch.save({"state_dict": state}, root / f"{part}.ckpt")
    halves = {
        "ss_decoder": (StructureDecoder, StructureVAEConfig),
        "slat_decoder_gs": (GaussianDecoder, GaussianDecoderConfig),
    }
    for part, (kind, config) in halves.items():
        args = {name: value for name, value in quoted[part].items() if name != "_target_"}
        torch.save(m.fill(kind(config(**args))).state_dict(), root / f"{part}.ckpt")


# The values.


def latents(m: Maker, stage, count: int):
    """Sample latents: by name for the first stage; on the voxels of `count` samples for the second."""
    if stage.name == files.STRUCTURE:
        shapes = stage.latents.shapes
        return NamedBatch({name: m.normal(count, *shape) for name, shape in shapes.items()})
    coords = m.voxels(range(6, 6 + count), stage.latents.resolution)
    return on(coords, m.normal(len(coords), stage.latents.channels))


def like(m: Maker, x):
    return x.with_feats(m.normal(*feats_of(x).shape))


def named(x) -> dict[str, torch.Tensor]:
    """Return latents by the ends of their values' names, or the features alone."""
    if isinstance(x, NamedBatch):
        return {f"/{name}": tensor for name, tensor in x.tensors.items()}
    return {"": x.feats}


def put(m: Maker, prefix: str, values: dict) -> None:
    for name, value in values.items():
        parts = named(value) if isinstance(value, (NamedBatch, SparseBatch)) else {"": value}
        m.add({f"{prefix}_{name}{part}": tensor for part, tensor in parts.items()})


def called(model: nn.Module, x, t: torch.Tensor, cond: torch.Tensor, *step: torch.Tensor):
    call = family.call_voxels if isinstance(x, SparseBatch) else family.call_mixture
    return call(model, x, t, cond, *step)


def velocities(m: Maker, short: str, stage) -> None:
    model = stage.model.requires_grad_(True)
    model.zero_grad()
    x = latents(m, stage, 2)
    t = m.times(2)
    cond = m.normal(2, 5, WIDTH).requires_grad_()
    step = (m.times(2) / 4,) if model.config.is_shortcut_model else ()
    weight = like(m, x)
    leaves = {"": x.feats} if isinstance(x, SparseBatch) else x.tensors
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = called(model, x, t, cond, *step)
    total = (feats_of(y) * feats_of(weight)).sum()
    total.backward()
    put(m, short, {"x": x, "t": t, "cond": cond, "y": y, "grad_weight": weight, "grad_scalar": total})
    put(m, short, {"grad_cond": cond.grad, "grad_norm": norm_of(model)} | ({"d": step[0]} if step else {}))
    m.add({f"{short}_grad_x{'/' if name else ''}{name}": leaf.grad for name, leaf in leaves.items()})
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    shown = [name for name in grads if name.endswith("mlp.0.bias") or ".to_q" in name]
    m.add({f"{short}_grad/{name}": grads[name] for name in shown})
    model.requires_grad_(False)
    if isinstance(x, SparseBatch):
        m.put(slat_coords=x.coords)
    else:
        inner_values(m, model, x, t, cond.detach(), step)
        # the pose does not pull at the shape
        m.put(ss_posegrad_x_shape=torch.zeros_like(x[SHAPE]), ss_posegrad_norm_shape_parameters=0.0)
    with torch.no_grad():
        put(m, short, {"y_null": called(model, x, t, torch.zeros_like(cond), *step)})
        if step:
            put(m, short, {"y_d0": called(model, x, t, cond)})


@torch.no_grad()
def inner_values(m: Maker, model: nn.Module, x, t: torch.Tensor, cond: torch.Tensor, step: tuple) -> None:
    """Record the blocks' outputs for the first sample, the tokens of times, and positions."""
    made = []
    hooks = [b.register_forward_hook(lambda _, told, out: made.append(out)) for b in model.blocks]
    first = model.blocks[0].register_forward_pre_hook(lambda _, told: m.put(ss_t_token=told[1]))
    given = model.t_embedder.mlp.register_forward_pre_hook(lambda _, told: m.put(ss_t_sincos=told[0]))
    called(model, x, t, cond, *step)
    for hook in (*hooks, first, given):
        hook.remove()
    m.add({f"ss_blocks_out/{group}": torch.stack([out[group][0] for out in made]) for group in made[0]})
    m.add({f"ss_pos/{name}": layers.pos_emb for name, layers in model.latent_mapping.items()})


def path_values(m: Maker, short: str, stage, weights: dict | None) -> None:
    """Record the path and its losses, with data at t = 1."""
    model = stage.model.requires_grad_(True)
    cond = torch.from_numpy(m.values[f"{short}_cond"])
    data = latents(m, stage, 2)
    if isinstance(data, SparseBatch):
        data = on(torch.from_numpy(m.values["slat_coords"]), m.normal(*m.values["slat_x"].shape))
    noise = like(m, data)
    t = m.times(2)
    x_t = stage.path.mix(data, 1 - t, noise)
    v = stage.velocity(x_t, 1 - t, cond)
    target = stage.path.velocity(data, noise)
    back = {"target": target.with_feats(-feats_of(target)), "pred": v.with_feats(-feats_of(v))}
    put(m, f"{short}_fm", {"data": data, "noise": noise, "t": t, "x_t": x_t} | back)
    losses = {"loss": ("grad_norm", stage.path)}
    if short == "ss":
        losses = {"loss_plain": ("plain_grad_norm", stage.path)}
        if weights:
            losses["loss_published"] = ("published_grad_norm", replace(stage.path, weights=weights))
    for name, (norm, path) in losses.items():
        model.zero_grad()
        loss = path.errors(stage.velocity(x_t, 1 - t, cond), data, noise).mean()
        loss.backward()
        put(m, f"{short}_fm", {name: loss, norm: norm_of(model)})
    model.requires_grad_(False)


@torch.no_grad()
def trajectories(m: Maker, short: str, stage, settings: dict) -> None:
    noise = latents(m, stage, 1)
    cond = m.normal(1, 5, WIDTH)
    put(m, f"{short}_smp", {"noise": noise, "cond": cond})
    if isinstance(noise, SparseBatch):
        m.put(slat_smp_coords=noise.coords)
    for name, asked in settings.items():
        low, high = (min(end / stage.sampling.time_scale, 1.0) for end in asked["interval"])
        sampling = replace(
            stage.sampling,
            steps=asked["steps"],
            rescale_t=asked["rescale_t"],
            cfg_strength=asked["strength"],
            cfg_interval=(1 - high, 1 - low),
        )
        states = [x for x, _ in trajectory(stage, noise, cond, torch.zeros_like(cond), sampling)]
        parts = [named(x) for x in states]
        m.add({f"{short}_smp_{name}_t": 1 - torch.tensor(times(sampling)[:-1]).double()})
        m.add({f"{short}_smp_{name}_x{part}": torch.stack([s[part] for s in parts]) for part in parts[0]})


@torch.no_grad()
def two_steps(m: Maker, stage) -> None:
    """Record the target of a network of steps: the mean of two steps of half the length."""
    x = latents(m, stage, 3)
    t = m.times(3) / 2
    d = m.times(3) / 4
    cond = m.normal(3, 5, WIDTH)
    first = called(stage.model, x, t, cond, d)
    there = x.with_feats(x.feats + d[:, None] * first.feats)
    second = called(stage.model, there, t + d, cond, d)
    target = x.with_feats((first.feats + second.feats) / 2)
    put(m, "ss_sc", {"x_t": x, "t": t, "d": d, "cond": cond, "target_whole_plain": target})
    put(m, "ss_sc", {"pred": called(stage.model, x, t, cond, 2 * d)})


def decoders(m: Maker, pipeline, file: files.PipelineFile) -> None:
    tokens, channels = pipeline.stages[0].latents.shapes[SHAPE]
    shape = m.normal(2, tokens, channels)
    side = round(tokens ** (1 / 3))
    logits = files.load_part(file, "structure decoder")(shape.mT.unflatten(2, [side] * 3))
    m.put(dec_shape=shape, dec_logits=logits)
    rows = []
    for b in range(2):
        (voxels,) = family.voxels_of(logits[b : b + 1])
        rows.append(torch.nn.functional.pad(voxels, (1, 0), value=b))
        for distance in {1, file.prune} - {0}:
            left = torch.nn.functional.pad(family.remove_inner_voxels(voxels, distance), (1, 0), value=b)
            m.add({f"dec_pruned{distance}_{b}": left})
    m.put(dec_coords=torch.cat(rows))
    solid = torch.cartesian_prod(*[torch.arange(7)] * 3)
    solid = solid[m.normal(len(solid)) < 1.2].int()
    m.put(prune_in=torch.nn.functional.pad(solid, (1, 0)), down_max=200)
    m.add(
        {
            f"prune_out{n}": torch.nn.functional.pad(family.remove_inner_voxels(solid, n), (1, 0))
            for n in (1, 3)
        }
    )
    m.put(down_out=torch.nn.functional.pad(family.reduce_voxels(solid, 200)[0], (1, 0)))
    coords = m.voxels((9,), 6)
    latent = m.normal(9, 5)
    feats = latent * torch.tensor(file.std) + torch.tensor(file.mean)
    decoder = files.load_part(file, "decoder")
    (made,) = decoder(SparseBatch(coords, feats, 1))
    raw = {name: getattr(made, name) for name in ("xyz", "features_dc", "scaling", "rotation", "opacity")}
    drawn = {"xyz": made.means, "scaling": made.scales, "rotation": made.rotations, "opacity": made.opacities}
    m.add({"coords": coords, "latent": feats, "latent_normalised": latent} | raw, "gs_")
    m.add(drawn, "gs_get_")
    m.put(gs_offset_perturbation=decoder.offset_perturbation)


def poses(m: Maker) -> None:
    latent = {name: m.normal(3, *size) for name, size in SIZES.items() if name != "rotation"}
    latent[pose.NORMALISED] = m.normal(3, 1, 6)
    scale = 0.5 + m.times(3)
    shift = m.normal(3)
    m.add(latent, "pose_in/")
    m.put(pose_scene_scale=scale, pose_scene_shift=shift)
    for how in pose.DECODERS:
        made = pose.decode_pose(latent, how, scale.expand(3, 3), shift.expand(3, 3))
        m.add({"translation": made.translation[:, None], "scale": made.scale[:, None]}, f"pose_{how}/")
        m.add({"rotation": -made.quaternion[:, None]}, f"pose_{how}/")


def pictures(m: Maker, file: files.PipelineFile, kinds: list) -> None:
    for k, (height, width, kind) in enumerate(kinds):
        rgba = m.picture(height, width, kind)
        points = m.normal(height // (k + 1), width // (k + 1), 3)
        points[..., 2] = points[..., 2].abs() + 1
        points[:2, :3] = float("nan")
        m.add({f"pre{k}_rgba": rgba, f"pre{k}_points": points})
        for short, stage in (("ss", "structure"), ("slat", "latent")):
            told = object_inputs(rgba, points if short == "ss" else None, file.cuts[stage])
            embedder = files.load_embedder(file.generators[stage])
            tokens = embedder({name: told[name][None] for name in embedder.names})[0]
            m.add(told, f"pre{k}_{short}/")
            m.add({f"pre{k}_{short}_tokens": tokens})


def adapted(m: Maker, stage, folder: Path) -> None:
    """Record outputs with adapters beside the weights, and a step of DPO with them."""
    tuned = m.adapters(stage.model, folder, 3, 2.0, ("self_attn.to_qkv.shape", "cross_attn.pose.to_q"))
    known = {name: torch.from_numpy(value) for name, value in m.values.items()}
    x = NamedBatch({name.removeprefix("ss_x/"): known[name] for name in known if name.startswith("ss_x/")})
    t, cond = (torch.from_numpy(m.values[f"ss_{name}"]) for name in ("t", "cond"))
    with torch.no_grad():
        put(m, "lora_ss", {"y": called(tuned, x, t, cond, torch.from_numpy(m.values["ss_d"]))})
    for parameter in lora_parameters(tuned):
        parameter.requires_grad_(True)
    pairs = {name: latents(m, stage, 2) for name in ("preferred", "rejected", "noise")}
    t = m.times(2)
    cond = m.normal(2, 5, WIDTH)
    put(m, "dpo", pairs | {"t": t, "cond": cond, "beta": 4.0})
    both = [
        NamedBatch({name: torch.cat([a[name], b[name]]) for name in a.tensors})
        for a, b in ((pairs["preferred"], pairs["rejected"]), (pairs["noise"], pairs["noise"]))
    ]
    again = 1 - torch.cat([t, t])
    x_t = stage.path.mix(both[0], again, both[1])

    def velocity():
        return stage.velocity(x_t, again, torch.cat([cond, cond]), tuned)

    target = stage.path.velocity(*both)
    v = velocity()
    with torch.no_grad(), adapters_off(tuned):
        before = velocity()
        reference = stage.path.errors(before, *both)
    for kind, made in (("", v), ("ref_", before)):
        for name in target.tensors:
            each = (made[name] - target[name]).square().mean((1, 2)).chunk(2)
            m.add({f"dpo_error_{kind}{side}/{name}": e for side, e in zip("wl", each, strict=True)})
    found = PairErrors.split(stage.path.errors(v, *both), reference)
    loss = pair_loss(found, DpoConfig(beta=4.0)).mean()
    loss.backward()
    put(m, "dpo", {"loss": loss, "margin": found.delta()})
    grads = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    m.add(grads, "dpo_grad/")
