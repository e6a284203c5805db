"""Write TRELLIS.2's values by this project's own code, with other sizes and options; see make_set."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image
from safetensors.torch import save_file

from eg3d_rlhf.geometry.dual_grid import dual_grid
from eg3d_rlhf.models.dino import Dino3
from eg3d_rlhf.models.image_preprocessing import at_most, on_black_first, over_black, squared
from eg3d_rlhf.models.lora import adapters_off, lora_parameters
from eg3d_rlhf.models.policies import PREFIX
from eg3d_rlhf.models.sparse import feats_of
from eg3d_rlhf.models.trellis2 import assets_of
from eg3d_rlhf.tuning.flow.base.sampling import sample, times, trajectory
from eg3d_rlhf.tuning.flow.families import trellis2 as family
from eg3d_rlhf.tuning.flow.families import trellis2_assets as surfaces
from eg3d_rlhf.tuning.flow.families import trellis2_files as files
from eg3d_rlhf.tuning.flow.families.trellis_files import build_model
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, pair_loss
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.compat.making import Maker, as_the_references, norm_of, on
from tests.compat.test_family_trellis2 import sampling_of
from tests.tuning.flow.families.trellis2.tiny_trellis2 import MODELS, PIPELINE, STRUCTURE

FLOW = {"cond_channels": 12, "mlp_ratio": 3}
CASES = {
    "cascade": {
        "kind": "1024_cascade",
        "flow": FLOW | {"model_channels": 36, "num_heads": 3, "num_blocks": 2},
        "sizes": {"structure": 4, "shape_512": 4, "shape_1024": 8, "texture": 8},
        "more": True,  # adapters, encoders, a DINOv3
        "pictures": [("soft", 40, 30), ("hard", 26, 47)],
    },
    "single": {
        "kind": "1024",
        "flow": FLOW | {"model_channels": 24, "num_heads": 2, "share_mod": False, "qk_rms_norm_cross": False},
        "sizes": {"structure": 6, "shape_1024": 6, "texture": 6},
        "more": False,
        "pictures": [],
    },
}
SAMPLINGS = {
    "short": {
        "steps": 2,
        "guidance_strength": 2.0,
        "guidance_rescale": 0.4,
        "guidance_interval": [0.1, 0.7],
        "rescale_t": 2.5,
    },
    "past_one": {
        "steps": 2,
        "guidance_strength": 1.0,
        "guidance_rescale": 0.0,
        "guidance_interval": [0.0, 1.0],
        "rescale_t": 0.5,
    },
}
STEMS = {  # of the flows, by their names in pipeline.json
    "sparse_structure_flow_model": "ss_flow",
    "shape_slat_flow_model_512": "shape_512",
    "shape_slat_flow_model_1024": "shape_1024",
    "tex_slat_flow_model_512": "tex_512",
    "tex_slat_flow_model_1024": "tex_1024",
}
OWN_SIGMA = 2e-4
USUAL = "shape_enc_next_dc_f16c32_fp16"


def make(root: Path, seed: int) -> None:
    """Write a cascade with all values, and a chain without encoders, adapters and DINOv3; tables are left
    out.
    """
    with as_the_references():
        for number, (name, said) in enumerate(CASES.items()):
            write_case(Maker(seed + 70 + number), root / "flow_trellis2" / name, said)


def write_case(m: Maker, folder: Path, said: dict) -> None:
    stages = files.CHAINS[said["kind"]]
    root = folder / "MODEL"
    write_networks(m, folder, root, said)
    pipeline = family.FAMILY.load(root, None)
    decoder = pipeline._decoder()
    cells = {stage: pipeline.cells(stage) for stage in stages}
    facts = {
        "case": folder.name,
        "seed": m.seed,
        "root": "MODEL",
        "pipeline_type": said["kind"],
        "stages": stages,
        "sigma_min": OWN_SIGMA,
        "resolutions": cells,
        "beta": 3.0,
        "samplings": SAMPLINGS,
        "sampler_of": {stage: files.SAMPLERS[stage] for stage in stages},
        "lr_resolution": cells.get(files.LOW, cells[pipeline.shape]) * decoder.config.finer,
        "resolution": cells[pipeline.shape] * decoder.config.finer,
        "pictures": said["pictures"],
        "picture_sizes": [48, 16],
        "encoder": "dino",
        "blocks_of": {"sample": 1},
        "tolerances": {"run": 1e-3},
        "half": False,
    }
    for stage in pipeline.stages:
        flow_values(m, stage)
        path_values(m, stage)
        trajectories(m, stage, pipeline.file)
        if said["more"] and stage.name != files.TEXTURE:
            adapted(m, stage, folder, facts["beta"])
    angles = pipeline.stages[0].model.angles(pipeline.stages[0].model.places())
    m.add({"structure/rope_phases_real": angles.cos(), "structure/rope_phases_imag": angles.sin()})
    with torch.no_grad():
        run(m, pipeline, facts)
        decoders(m, pipeline, facts["resolution"])
        if said["more"]:
            encoders(m, pipeline)
            pictures(m, folder, facts)
    (folder / "case.json").write_text(json.dumps(facts, indent=1))
    m.write(folder / "values.npz")


def write_networks(m: Maker, folder: Path, root: Path, said: dict) -> None:
    resolutions = dict(zip(files.CHAINS[said["kind"]].values(), said["sizes"].values(), strict=True))
    contents = copy.deepcopy({**MODELS, **STRUCTURE})
    for model, resolution in resolutions.items():
        contents[STEMS[model]]["args"] |= said["flow"] | {"resolution": resolution, "dtype": "float32"}
    contents[USUAL] = contents.pop("shape_enc")
    del contents["ss_enc_conv3d_16l8_fp16"]
    if not said["more"]:
        del contents[USUAL], contents["tex_enc_next_dc_f16c32_fp16"]
    used = {STEMS[model] for model in resolutions}
    for stem, content in contents.items():
        if stem in STEMS.values() and stem not in used:
            continue
        ckpts = (folder / "trellis" if stem in STRUCTURE else root) / "ckpts"
        ckpts.mkdir(parents=True, exist_ok=True)
        model = build_model(content, stem, files.ARCHITECTURES).float()
        save_file(m.fill(model).state_dict(), ckpts / f"{stem}.safetensors")
        (ckpts / f"{stem}.json").write_text(json.dumps(content))
    args = copy.deepcopy(PIPELINE["args"]) | {"default_pipeline_type": said["kind"]}
    for key in set(files.SAMPLERS.values()):
        args[key]["args"]["sigma_min"] = OWN_SIGMA
        args[key]["params"] |= {"steps": 3, "rescale_t": 2.0, "guidance_interval": [0.3, 1.0]}
    args["shape_slat_normalization"] = {"mean": [0.1, -0.2, 0.3, 0.0], "std": [1.5, 0.7, 1.0, 2.0]}
    (root / "pipeline.json").write_text(json.dumps({**PIPELINE, "args": args}))
    if said["more"]:
        named = {"models": {"shape_slat_encoder": f"ckpts/{USUAL}"}}
        (root / files.TEXTURING).write_text(json.dumps({"args": named}))


def latents(m: Maker, stage, counts: tuple[int, ...], *, of=None):
    """Sample noise or data of a stage, on the voxels of another batch where one is given."""
    channels = stage.latents.channels
    side = stage.latents.resolution
    if stage.name == files.STRUCTURE:
        return m.normal(len(counts), channels, side, side, side)
    coords = m.voxels(counts, side) if of is None else of.coords
    given = None
    if stage.latents.given:
        given = m.normal(len(coords), stage.latents.given) if of is None else of.given
    return on(coords, m.normal(len(coords), channels), given)


def put(m: Maker, stage, values: dict) -> None:
    m.add(values, f"{stage.name}/")


def placed(x, prefix: str = "") -> dict:
    """Return the voxels of a batch, and its conditioning features."""
    if isinstance(x, torch.Tensor):
        return {}
    return {f"{prefix}coords": x.coords} | ({} if x.given is None else {f"{prefix}given": x.given})


def flow_values(m: Maker, stage) -> None:
    model = stage.model.requires_grad_(True)
    model.zero_grad()
    x = latents(m, stage, (9, 14))
    t = m.times(2)
    cond = m.normal(2, 5, model.config.cond_channels).requires_grad_()
    numbers = feats_of(x).clone().requires_grad_()
    given = None if getattr(x, "given", None) is None else x.given.clone().requires_grad_()
    leaf = numbers if isinstance(x, torch.Tensor) else replace(x, feats=numbers, given=given)
    weight = m.normal(*feats_of(x).shape)
    y = feats_of(model(leaf, t, cond))
    total = (y * weight).sum()
    total.backward()
    put(m, stage, {"x": numbers, "t": t, "cond": cond, "y": y, "grad_weight": weight, "grad_scalar": total})
    put(m, stage, placed(x) | {"grad_x": numbers.grad, "grad_cond": cond.grad, "grad_norm": norm_of(model)})
    if given is not None:
        put(m, stage, {"grad_given": given.grad})
    grads = {name: p.grad for name, p in model.named_parameters()}
    put(m, stage, {"grad_norms": torch.stack([grads[name].norm() for name in sorted(grads)])})
    put(m, stage, {f"grad/{name}": grads[name] for name in ("input_layer.weight", "blocks.0.mlp.mlp.2.bias")})
    blocks = []
    hooks = [b.register_forward_hook(lambda _, told, out: blocks.append(out)) for b in model.blocks]
    one = x[1:] if isinstance(x, torch.Tensor) else type(x).join(x.samples()[1:])
    model.requires_grad_(False)
    with torch.no_grad():
        model(one, t[1:], cond[1:])
        token = model.t_embedder(t)
        put(m, stage, {"t_token": token})
        if hasattr(model, "adaLN_modulation"):
            put(m, stage, {"modulation": model.adaLN_modulation(token)})
    for hook in hooks:
        hook.remove()
    put(m, stage, {"blocks_out": torch.stack([block.flatten(0, -2) for block in blocks])})


def path_values(m: Maker, stage) -> None:
    model = stage.model.requires_grad_(True)
    model.zero_grad()
    data = latents(m, stage, (8, 11, 5))
    noise = latents(m, stage, (8, 11, 5), of=data)
    t = m.times(3)
    cond = m.normal(3, 5, model.config.cond_channels)
    x_t = stage.path.mix(data, t, noise)
    target = stage.path.velocity(data, noise)
    v = stage.velocity(x_t, t, cond)
    loss = (feats_of(v) - feats_of(target)).square().mean()
    loss.backward()
    made = {"x0": data, "noise": noise, "x_t": x_t, "target": target, "pred": v}
    put(m, stage, {f"fm_{name}": feats_of(x) for name, x in made.items()} | placed(data, "fm_"))
    made = {"t": t, "cond": cond, "loss": loss, "loss_each": stage.path.errors(v, data, noise)}
    made |= {"grad_norm": norm_of(model), "grad_block0_to_qkv": model.blocks[0].self_attn.to_qkv.weight.grad}
    put(m, stage, {f"fm_{name}": value for name, value in made.items()})
    model.requires_grad_(False)


@torch.no_grad()
def trajectories(m: Maker, stage, file) -> None:
    noise = latents(m, stage, (7,))
    cond = m.normal(1, 5, stage.model.config.cond_channels)
    put(m, stage, {"smp_noise": feats_of(noise), "smp_cond": cond} | placed(noise, "smp_"))
    own = json.loads((file.root / "pipeline.json").read_text())["args"][files.SAMPLERS[stage.name]]["params"]
    for name, params in (("short", SAMPLINGS["short"]), ("own", own)):
        sampling = sampling_of(stage, params)
        steps = list(trajectory(stage, noise, cond, torch.zeros_like(cond), sampling))
        put(m, stage, {f"smp_{name}_times": torch.tensor(times(sampling), dtype=torch.float64)})
        for kind, which in (("x_t", 0), ("x_0", 1)):
            put(m, stage, {f"smp_{name}_{kind}": torch.stack([feats_of(step[which]) for step in steps])})


def adapted(m: Maker, stage, folder: Path, beta: float) -> None:
    """Record outputs with adapters beside the weights, and a step of DPO with them."""
    tuned = m.adapters(stage.model, folder / "adapters" / stage.name, 3, 4.5, ("to_qkv", "to_kv"))
    place = f"{stage.name}/"
    x = torch.from_numpy(m.values[place + "x"])
    if stage.name != files.STRUCTURE:
        x = on(torch.from_numpy(m.values[place + "coords"]), x)
    t, cond = (torch.from_numpy(m.values[place + name]) for name in ("t", "cond"))
    with torch.no_grad():
        put(m, stage, {"lora_y": feats_of(tuned(x, t, cond))})
    for parameter in lora_parameters(tuned):
        parameter.requires_grad_(True)
    t = m.times(2)
    cond = m.normal(2, 5, stage.model.config.cond_channels)
    put(m, stage, {"dpo_t": t, "dpo_cond": cond})
    errors = []
    reference = []
    for side, counts in (("preferred", (6, 9)), ("rejected", (10, 4))):
        data = latents(m, stage, counts)
        noise = latents(m, stage, counts, of=data)
        x_t = stage.path.mix(data, t, noise)
        errors.append(stage.path.errors(stage.velocity(x_t, t, cond, tuned), data, noise))
        with torch.no_grad(), adapters_off(tuned):
            reference.append(stage.path.errors(stage.velocity(x_t, t, cond, tuned), data, noise))
        made = {side: feats_of(data), f"eps_{side}": feats_of(noise), f"error_{side}": errors[-1]}
        made[f"ref_{side}"] = reference[-1]
        made |= {f"{name}_{side}": value for name, value in placed(data).items()}
        put(m, stage, {f"dpo_{name}": value for name, value in made.items()})
    pairs = PairErrors.split(torch.cat(errors), torch.cat(reference))
    loss = pair_loss(pairs, DpoConfig(beta=beta)).mean()
    loss.backward()
    put(m, stage, {"dpo_loss": loss, "dpo_grad_norm": norm_of(tuned)})
    grads = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    put(m, stage, {f"dpo_grad/{PREFIX}{name}": grad for name, grad in grads.items()})


def run(m: Maker, pipeline, facts: dict) -> None:
    """Record how one asset is sampled, with all of its noise."""
    width = facts_width(pipeline)
    for name in (family.SMALL, family.LARGER):
        m.add({f"run/cond_{name}": m.normal(1, 4, width)})
    left = None
    for number, stage in enumerate(pipeline.stages):
        cond = torch.from_numpy(m.values[f"run/cond_{pipeline.conditioning_key(stage.name)}"])
        if left is None:
            noise = latents(m, stage, (1,))
        else:
            places = left if isinstance(left, torch.Tensor) else left.coords
            given = left.feats if stage.latents.given else None
            noise = on(F.pad(places, (1, 0)), m.normal(len(places), stage.latents.channels), given)
            m.add({f"run/{stage.name}/coords": noise.coords})
        x_0 = sample(stage, noise, cond, torch.zeros_like(cond))
        m.add({f"run/{stage.name}/noise": feats_of(noise)})
        if left is None:
            logits = pipeline.part(files.STRUCTURE_DECODER)(x_0)
            m.add({"run/structure/x_0": x_0, "run/structure/logits": logits})
        else:
            m.add({f"run/{stage.name}/slat": pipeline.unnormalised(x_0.feats, stage.name)})
        if number + 1 < len(pipeline.stages):
            (left,) = pipeline.advance(stage.name, x_0)
    (asset,) = pipeline.decode(x_0)
    coords, slat = (torch.from_numpy(m.values[f"run/{pipeline.shape}/{name}"]) for name in ("coords", "slat"))
    made, logits = pipeline._decoder()(on(coords, slat))
    m.add({f"run/decoded/subdivision_{i}": each for i, each in enumerate(logits)})
    vertices, faces = surfaces.surface_of(asset)
    m.add(
        {
            "run/decoded/coords": made.coords,
            "run/decoded/shape": made.feats,
            "run/resolution": asset.resolution,
        }
    )
    m.add(
        {
            "run/decoded/materials": asset.materials,
            "run/decoded/vertices": vertices,
            "run/decoded/faces": faces,
        }
    )
    if files.LOW in pipeline.configs and files.HIGH in pipeline.configs:
        cascade(m, pipeline, facts)


def facts_width(pipeline) -> int:
    (width,) = {config.cond_channels for config in pipeline.configs.values()}
    return width


def cascade(m: Maker, pipeline, facts: dict) -> None:
    decoder = pipeline._decoder()
    low = [torch.from_numpy(m.values[f"run/shape_512/{name}"]) for name in ("coords", "slat")]
    fine, _ = decoder(on(*low), split_count=len(decoder.config.up_block_type))
    finer = decoder.config.finer
    asked = facts["resolution"] + 2 * family.RESOLUTION_STEP
    voxels = fine.coords[:, 1:]
    coords, cells = family.finer_voxels(voxels, facts["lr_resolution"], asked, facts["resolution"], finer, 3)
    m.add({"run/upsampled": fine.coords, "run/reduced_asked": asked, "run/reduced_max_tokens": 3})
    m.add({"run/reduced_coords": F.pad(coords, (1, 0)), "run/reduced_resolution": cells * finer})


def decoders(m: Maker, pipeline, resolution: int) -> None:
    decoder = pipeline._decoder()
    shape = next(stage for stage in pipeline.stages if stage.name == pipeline.shape)
    latent = latents(m, shape, (12, 7))
    made, logits = decoder(latent)
    texture = latent.with_feats(m.normal(*latent.feats.shape))
    materials, _ = pipeline.part(files.TEXTURE_DECODER)(texture, logits)
    m.add({"dec/coords_in": latent.coords, "dec/latent": latent.feats, "dec/tex_latent": texture.feats})
    m.add({"dec/coords": made.coords, "dec/shape": made.feats, "dec/materials": materials.feats})
    m.add({f"dec/subdivision_{i}": each for i, each in enumerate(logits)})
    m.add({"dec/childless": np.array([int((each <= 0).all(1).sum()) for each in logits])})
    for i, asset in enumerate(assets_of(made, None, resolution, decoder.config.voxel_margin)):
        vertices, faces = surfaces.surface_of(asset)
        m.add({f"dec/vertices_{i}": vertices, f"dec/faces_{i}": faces})


def encoders(m: Maker, pipeline) -> None:
    """Record the encodings of a mesh by its dual grid; materials are random."""
    cells = 12
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.37)
    vertices = torch.from_numpy(ball.vertices * [1.0, 0.8, 1.1])
    faces = torch.from_numpy(ball.faces)
    grid = dual_grid(vertices, faces, cells)
    given = surfaces.encoded_shape(grid.coords, grid.vertices, grid.crossed)
    materials = 2 * torch.rand(len(grid.coords), 6, generator=m.generator) - 1
    made = {"mesh_vertices": vertices, "mesh_faces": faces, "coords": grid.coords, "resolution": cells}
    made |= {"dual_vertices": grid.vertices, "intersected": grid.crossed, "materials": materials}
    halves = {
        "shape": (files.SHAPE_ENCODER, given),
        "tex": (files.TEXTURE_ENCODER, given.with_feats(materials)),
    }
    for short, (name, told) in halves.items():
        mean, logvar = pipeline.part(name)(told)
        made |= {f"{short}_mean": mean.feats, f"{short}_logvar": logvar.feats, "shape_coords": mean.coords}
    asset = family.VoxelAsset(
        coords=grid.coords,
        resolution=cells,
        vertices=grid.vertices,
        crossed=grid.crossed,
        split=torch.ones(len(grid.coords)),
    )
    m.add(made | {"back_faces": len(surfaces.surface_of(asset)[1])}, "enc/")


def pictures(m: Maker, folder: Path, facts: dict) -> None:
    from transformers import DINOv3ViTConfig

    width = m.values["run/cond_512"].shape[-1]
    content = {
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    content |= {"num_register_tokens": 4, "patch_size": 16, "model_type": "dinov3_vit", "rope_theta": 50.0}
    network = m.fill(Dino3(DINOv3ViTConfig.from_dict(content)))
    (folder / "dino").mkdir()
    save_file(network.state_dict(), folder / "dino" / "model.safetensors")
    (folder / "dino" / "config.json").write_text(json.dumps(content))
    sizes = tuple(facts["picture_sizes"])
    for k, (kind, height, wide) in enumerate(facts["pictures"]):
        rgba = m.picture(height, wide, kind)
        image = Image.fromarray(rgba)
        cut = over_black(squared(at_most(image, 1024), 1.0))
        m.add({f"pre{k}/rgba": rgba, f"pre{k}/cut": cut})
        for size, picture in zip(sizes, on_black_first(image, sizes), strict=True):
            m.add({f"pre{k}/image_{size}": (picture.permute(1, 2, 0) * 255).round().byte()})
            m.add({f"pre{k}/tokens_{size}": family.image_tokens(network, picture[None])})
    shown = torch.rand(1, 3, 16, 48, generator=m.generator)
    m.put(enc_image=shown, enc_tokens=family.image_tokens(network, shown))
    m.put(enc_last_hidden_state=network.norm(network(shown)))
