"""Write Hunyuan3D-2.1's values by this project's own code, with other sizes and options; see make_set."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from eg3d_rlhf.models.dino import Dino
from eg3d_rlhf.models.hunyuan3d import Denoiser, ShapeDecoder, ShapeEncoder, choose_points, embedded
from eg3d_rlhf.models.image_preprocessing import on_white, over_white, place_in_square
from eg3d_rlhf.models.policies import ADAPTER
from eg3d_rlhf.tuning.flow.base.sampling import times, trajectory
from eg3d_rlhf.tuning.flow.families import hunyuan3d as family
from eg3d_rlhf.tuning.flow.families import hunyuan3d_files as layout
from tests.compat.making import Maker, norm_of
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import CONTENT

MODEL = {"input_size": 10, "in_channels": 3, "context_dim": 12, "hidden_size": 24, "depth": 3, "num_heads": 3}
VAE = {"num_latents": 10, "embed_dim": 3, "width": 12, "heads": 3, "num_freqs": 4, "num_decoder_layers": 1}
DINO = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 42}
CASES = {  # what differs from CONTENT, and from the settings above
    "with_experts": {
        "model": MODEL | {"num_moe_layers": 1, "num_experts": 4, "moe_top_k": 1, "qkv_bias": True},
        "vae": VAE | {"pc_size": 150, "pc_sharpedge_size": 50, "scale_factor": 1.7, "downsample_ratio": 8},
        "dino": DINO | {"shown": 28},
        "prepared": {"size": 64, "border_ratio": 0.1},
        "shift": 2.0,
        "pictures": [("soft", 40, 33), ("opaque", 20, 31)],
    },
    "without_experts": {
        "model": MODEL | {"num_moe_layers": 0, "qk_norm": False, "depth": 4},
        "vae": VAE | {"point_feats": 3, "include_pi": True, "pc_size": 90},
        "dino": DINO | {"shown": 42},
        "prepared": {"size": 80, "border_ratio": 0.25},
        "shift": 1.0,
        "pictures": [("hard", 30, 52), ("soft", 44, 44), ("soft", 25, 36)],
    },
}


def make(root: Path, seed: int) -> None:
    """Write both cases: the second has no experts, no times of 50 points, no surface and no adapters. Tables
    are left out.
    """
    for number, (name, said) in enumerate(CASES.items()):
        write_case(Maker(seed + 50 + number), root / "flow_hunyuan3d" / name, said)


def content_of(said: dict) -> dict:
    content = copy.deepcopy(CONTENT)
    content["model"]["params"] |= said["model"]
    content["vae"]["params"] |= said["vae"]
    shown = content["conditioner"]["params"]["main_image_encoder"]["kwargs"]
    told = dict(said["dino"])
    shown["image_size"] = told.pop("shown")
    shown["config"] |= told
    content["scheduler"]["params"]["shift"] = said["shift"]
    content["image_processor"] = {"target": "ImageProcessorV2", "params": said["prepared"]}
    return content


def write_case(m: Maker, folder: Path, said: dict) -> None:
    whole = said["model"]["num_moe_layers"] > 0
    root = folder / layout.FOLDER
    root.mkdir(parents=True, exist_ok=True)
    content = content_of(said)
    (root / layout.CONFIG).write_text(yaml.safe_dump(content))
    (root / "model.safetensors").touch()
    files = layout.read_files(root)
    model = m.fill(Denoiser(files.model))
    decoder = m.fill(ShapeDecoder(files.vae))
    encoder = m.fill(ShapeEncoder(files.vae))
    dino = m.fill(Dino(files.encoder))
    if whole:
        surface(m, files, decoder)
    state = {f"model.{name}": x for name, x in model.state_dict().items()}
    state |= {f"vae.{name}": x for half in (decoder, encoder) for name, x in half.state_dict().items()}
    named = dino.state_dict().items()
    state |= {f"conditioner.{layout.ENCODER}{name}": x.contiguous() for name, x in named}
    save_file({name: x.clone() for name, x in state.items()}, root / "model.safetensors")
    facts = {
        "case": folder.name,
        "seed": m.seed,
        "root": layout.FOLDER,
        "checkpoint": "model.safetensors",
        "pictures": [kind for kind, *_ in said["pictures"]],
        "samplings": {"one": {"points": 4, "guidance": 3.5}, "none": {"points": 5, "guidance": -1.0}},
        "octree_resolution": 12,
        "bounds": family.BOUND,
        "blocks_of": {"sample": 1, "time": 0},
    }
    flow(m, model)
    losses(m, files, model)
    samplers(m, files, model, facts["samplings"])
    pictures(m, files, dino, said["pictures"])
    points(m, files, encoder)
    if whole:
        m.add({f"smp_times_{n}": moved(files, n) for n in (50, 9)})
        facts["lora"] = {"rank": 3, "alpha": 5, "targets": ["to_v", "out_proj"], "file": ADAPTER}
        with torch.no_grad():
            tuned = m.adapters(model, folder, 3, 5, facts["lora"]["targets"])
            (folder / "adapter_config.json").unlink()
            x, t, cond = (torch.from_numpy(m.values[name]) for name in ("x", "t", "cond"))
            m.put(lora_y=tuned(x, t, {"main": cond}))
    (folder / "case.json").write_text(json.dumps(facts, indent=1))
    m.write(folder / "values.npz")


def flow(m: Maker, model: Denoiser) -> None:
    config = model.config
    x = m.normal(2, config.input_size, config.in_channels).requires_grad_()
    t = m.times(2)
    cond = m.normal(2, 6, config.context_dim).requires_grad_()
    weight = m.normal(*x.shape)
    model.requires_grad_(True).zero_grad()
    y = model(x, t, {"main": cond})
    total = (y * weight).sum()
    total.backward()
    m.put(x=x, t=t, cond=cond, y=y, grad_weight=weight, grad_scalar=total)
    m.put(grad_x=x.grad, grad_cond=cond.grad, grad_norm=norm_of(model))
    shown = ("blocks.0.attn1.to_k.weight", "x_embedder.weight", "final_layer.linear.bias")
    m.add({name: model.get_parameter(name).grad for name in shown}, "grad/")
    made = []
    hooks = [block.register_forward_hook(lambda _, given, out: made.append(out)) for block in model.blocks]
    hooks.append(model.t_embedder.register_forward_hook(lambda _, given, out: m.put(t_token=out)))
    hooks.append(model.t_embedder.mlp.register_forward_pre_hook(lambda _, given: m.put(t_sincos=given[0])))
    with torch.no_grad():
        model(x[1:], t[:1], {"main": cond[1:]})
        m.put(blocks_out=torch.stack(made))
        model(x, t, {"main": cond})
    for hook in hooks:
        hook.remove()


def losses(m: Maker, files: layout.ShapeFiles, model: Denoiser) -> None:
    """Record the loss, with data at t = 1, with the term that balances experts and without it."""
    cond = torch.from_numpy(m.values["cond"])
    data = m.normal(2, model.config.input_size, model.config.in_channels)
    noise = m.normal(*data.shape)
    t = m.times(2)
    column = t[:, None, None]
    x_t = column * data + (1 - column) * noise
    target = data - noise
    m.put(fm_x0=data, fm_noise=noise, fm_t=t, fm_x_t=x_t, fm_target=target)
    terms = []

    def balance(gate, given, out):
        p = torch.nn.functional.linear(given[0], gate.weight).softmax(-1)
        share = torch.nn.functional.one_hot(out[1], len(gate.weight)).float().mean((0, 1)) * len(gate.weight)
        terms.append(0.01 * (p.mean(0) * share).sum())

    hooks = [block.moe.gate.register_forward_hook(balance) for block in model.blocks if block.mixture]
    for name in ("fm", "fm_aux") if hooks else ("fm",):
        terms.clear()
        model.zero_grad()
        v = model(x_t, t, {"main": cond})
        each = (v - target).square().mean((1, 2))
        total = each.mean() + (sum(terms) if name == "fm_aux" else 0)
        total.backward()
        first = model.blocks[0].attn1.to_q.weight.grad
        m.add({f"{name}_grad_norm": norm_of(model), f"{name}_grad_block0_to_q": first})
        if name == "fm":
            m.put(fm_pred=v, fm_loss_each=each, fm_loss=each.mean())
        else:
            m.put(fm_aux_loss=torch.stack(terms))
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)


def moved(files: layout.ShapeFiles, points: int) -> torch.Tensor:
    """Return the sampler's times, which are 0 at the noise."""
    sampling = replace(family.sampling(files.shift), steps=points - 1)
    return 1 - torch.tensor([*times(sampling), 0.0], dtype=torch.float64)


@torch.no_grad()
def samplers(m: Maker, files: layout.ShapeFiles, model: Denoiser, settings: dict) -> None:
    (stage,) = family.ShapePipeline(files, model, None, lambda name: None).stages
    noise = m.normal(1, model.config.input_size, model.config.in_channels)
    cond = m.normal(1, 6, model.config.context_dim)
    m.put(smp_noise=noise, smp_cond=cond)
    for name, asked in settings.items():
        strength = max(asked["guidance"] - 1, 0.0)
        sampling = replace(stage.sampling, steps=asked["points"] - 1, cfg_strength=strength)
        told = {"main": cond}, {"main": torch.zeros_like(cond)}
        states = [x for x, _ in trajectory(stage, noise, *told, sampling)]
        states.append(states[-1])
        m.add({f"smp_{name}_times": moved(files, asked["points"]), f"smp_{name}_x_t": torch.stack(states)})
        m.add({f"smp_{name}_out": states[-1]})


@torch.no_grad()
def pictures(m: Maker, files: layout.ShapeFiles, dino: Dino, kinds: list) -> None:
    for k, (kind, height, width) in enumerate(kinds):
        rgba = m.picture(height, width, kind)
        square = place_in_square(rgba, files.border)
        picture, mask = on_white(Image.fromarray(rgba), files.image_size, files.border)
        tokens = family.image_tokens(files, dino, family.as_image(picture))
        made = {"rgba": rgba, "square": over_white(square), "square_mask": square[..., 3], "image": picture}
        m.add(made | {"mask": mask, "tokens": tokens}, f"pre{k}_")
    shown = 2 * torch.rand(3, 3, 30, 30, generator=m.generator) - 1
    tokens = family.image_tokens(files, dino, shown / 2 + 0.5)
    m.put(enc_image=shown, enc_tokens=tokens, enc_null=torch.zeros_like(tokens))


@torch.no_grad()
def surface(m: Maker, files: layout.ShapeFiles, decoder: ShapeDecoder) -> None:
    """Record a surface whose vertices are placed as published: index / n of n points."""
    cells = 12
    latents = m.normal(1, files.vae.num_latents, files.vae.embed_dim, scale=2)
    asked = 2 * torch.rand(1, 20, 3, generator=m.generator) - 1
    tokens = decoder(latents)
    axis = torch.linspace(-family.BOUND, family.BOUND, cells + 1)
    middle = decoder.slab(tokens, axis, slice(0, cells + 1)).median()
    decoder.geo_decoder.output_proj.bias.sub_(middle)  # so that the surface goes through the cube
    logits = decoder.geo_decoder(asked, tokens)
    grid = decoder.slab(tokens, axis, slice(0, cells + 1))
    vertices, faces = family.ShapeAsset(latents[0], decoder).surface(cells)
    published = (vertices.astype(np.float64) + family.BOUND) * cells / (cells + 1) - family.BOUND
    m.put(dec_latents=latents, dec_tokens=tokens, dec_points=asked, dec_logits=logits, dec_grid=grid[None])
    m.put(
        dec_embedded=embedded(asked, decoder.config), dec_level=0.0, dec_vertices=published, dec_faces=faces
    )


@torch.no_grad()
def points(m: Maker, files: layout.ShapeFiles, encoder: ShapeEncoder) -> None:
    config = files.vae
    count = config.pc_size + config.pc_sharpedge_size
    places = torch.nn.functional.normalize(m.normal(count, 3), dim=1)
    whole = torch.cat([0.8 * places, places, m.normal(count, config.point_feats - 3).sign()], 1)
    queries, kept = choose_points(whole, config, torch.Generator().manual_seed(m.seed))
    mean, logvar = encoder(queries[None], kept[None])
    m.put(vae_surface=whole[None], vae_query=queries[None], vae_data=kept[None])
    m.put(vae_encoded=encoder.encoder(queries[None], kept[None]), vae_mean=mean, vae_logvar=logvar)
