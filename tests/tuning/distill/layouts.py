"""Tiny networks with random weights in the published layouts: folders and files as they are published, at
reduced width.

The state dicts come from the libraries that published files come from (diffusers, transformers) or from the
published names; MVDream's and HPSv2's are written under their own names by the inverse of what the readers
do, spelled out here a second time.
"""

import json
import re
from pathlib import Path

import torch

from tests.models.published_names import published

LATENT = 8  # pixels per side


def clip_words() -> list[str]:
    """Byte-level vocabulary of 514: bytes, bytes that end a word, two marks."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    return [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]


def write_clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Path:
    """As SD's tokenizer/."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(clip_words())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    return folder


def write_bert_tokenizer(folder: Path) -> int:
    """As bert-base-uncased's -> words in it."""
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return len(words)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that matter: normal matrices of unit gain, small biases; norms about 1."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            z = torch.randn(p.shape, generator=draws)
            if p.ndim > 1:
                p.copy_(z / p[0].numel() ** 0.5)
            else:
                p.copy_(1 + 0.1 * z if name.endswith("weight") else 0.1 * z)
    return module


def latent_networks(form: str, cameras: bool = False):
    """(U-Net, autoencoder, text encoder) of Stable Diffusion "1.5" or "2.1", or MVDream, at reduced width."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    linear = form == "2.1"
    width = 64
    camera = (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16} if cameras else {}
    )
    unet = UNet2DConditionModel(
        sample_size=32 if cameras else LATENT,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2) if linear else 8,
        use_linear_projection=linear,
        **camera,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        sample_size=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=width,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            hidden_act="gelu" if linear else "quick_gelu",
            bos_token_id=512,
            eos_token_id=513,
        )
    )
    return tuple(randomise(net, i).eval() for i, net in enumerate((unet, vae, text)))


def write_stable_diffusion(folder: Path, form: str) -> Path:
    """Stable Diffusion "1.5" (epsilon) or "2.1" (v)."""
    from diffusers import DDIMScheduler

    for part, net in zip(("unet", "vae", "text_encoder"), latent_networks(form), strict=True):
        net.save_pretrained(folder / part, safe_serialization=True)
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if form == "2.1" else "epsilon",
    ).save_pretrained(folder / "scheduler")
    write_clip_tokenizer(folder / "tokenizer", "!" if form == "2.1" else "<|endoftext|>")
    return folder


def ldm_unet(state: dict) -> dict:
    """diffusers' names of the U-Net above under LDM's: two levels of one block, attention in the first."""
    blocks = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding.linear_1": "camera_embed.0",
        "class_embedding.linear_2": "camera_embed.2",
    }
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    new = {}
    for name, tensor in state.items():
        start = next(now for now in blocks if name.startswith(f"{now}."))
        rest = name.removeprefix(f"{start}.")
        if "resnets" in start:
            head, _, tail = rest.partition(".")
            rest = f"{inside[head]}.{tail}"
        new[f"model.diffusion_model.{blocks[start]}.{rest}"] = tensor
    return new


def ldm_vae(state: dict) -> dict:
    """diffusers' names of the autoencoder above under LDM's."""
    pairs = (
        (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.0\.", "up.1."),
        (r"up_blocks\.1\.", "up.0."),
        (r"resnets\.(\d)\.", r"block.\1."),
        (r"upsamplers\.0", "upsample"),
        (r"mid_block\.block\.0", "mid.block_1"),
        (r"mid_block\.block\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    )
    new = {}
    for name, tensor in state.items():
        linear = "attentions" in name and tensor.ndim == 2
        for old, now in pairs:
            name = re.sub(old, now, name)
        new[f"first_stage_model.{name}"] = tensor[:, :, None, None] if linear else tensor
    return new


def open_clip_text(state: dict, layers: int) -> dict:
    """transformers' CLIPTextModel under open_clip's names, with the queries, keys and values packed."""
    new = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
    }
    for part in ("weight", "bias"):
        new[f"ln_final.{part}"] = state[f"text_model.final_layer_norm.{part}"]
        for i in range(layers):
            old = f"text_model.encoder.layers.{i}"
            now = f"transformer.resblocks.{i}"
            new[f"{now}.attn.in_proj_{part}"] = torch.cat(
                [state[f"{old}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            )
            for theirs, ours in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                new[f"{now}.{theirs}.{part}"] = state[f"{old}.{ours}.{part}"]
            new[f"{now}.attn.out_proj.{part}"] = state[f"{old}.self_attn.out_proj.{part}"]
    return new


def write_mvdream(folder: Path, form: str) -> Path:
    """sd-v2.1-base-4view.pt or sd-v1.5-4view.pt with tokenizer/ beside it -> the file."""
    unet, vae, text = (net.state_dict() for net in latent_networks(form, cameras=True))
    state = {**ldm_unet(unet), **ldm_vae(vae)}
    if form == "2.1":  # the encoder's last layer is in the file and not used
        encoder = open_clip_text(text, 2)
        last = {
            n.replace("resblocks.1.", "resblocks.2."): torch.full_like(t, torch.nan)
            for n, t in encoder.items()
            if "resblocks.1." in n
        }
        state |= {
            f"cond_stage_model.model.{n}": t
            for n, t in {**encoder, **last, "text_projection": torch.zeros(64, 64)}.items()
        }
    else:
        state |= {f"cond_stage_model.transformer.{n}": t for n, t in text.items()}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    state["betas"], state["alphas_cumprod"] = betas.float(), (1 - betas).cumprod(0).float()
    write_clip_tokenizer(folder / "tokenizer")
    torch.save(state, folder / f"sd-v{form}-4view.pt")
    return folder / f"sd-v{form}-4view.pt"


def write_blip_reward(folder: Path, kind: str) -> Path:
    """ImageReward.pt or Reward3D_*.pt with BERT's tokenizer/ beside it -> the file."""
    from eg3d_rlhf.models.blip import VISION, BlipSizes
    from eg3d_rlhf.rewards.images.reward3d import Reward3dNetwork

    words = write_bert_tokenizer(folder / "tokenizer") + 2
    sizes = BlipSizes(
        image=32,
        vision_width=128,
        vision_layers=2,
        text_width=192,
        text_layers=2,
        text_hidden=256,
        vocabulary=words,
        positions=128,
        projection=16,
    )
    state = published(randomise(Reward3dNetwork(kind, sizes)).state_dict(), VISION)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(128)[None]
    torch.save(state, folder / f"{kind}.pt")
    return folder / f"{kind}.pt"


def clip_model(act: str = "quick_gelu", heads: int = 2):
    """transformers' CLIPModel at reduced width."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 514,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "hidden_act": act,
        "bos_token_id": 512,
        "eos_token_id": 513,
    }
    vision = {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": act,
    }
    return randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))).eval()


def write_clip(folder: Path) -> Path:
    """A CLIPModel folder."""
    write_clip_tokenizer(folder)
    clip_model().save_pretrained(folder, safe_serialization=True)
    return folder


def write_hpsv2(folder: Path) -> Path:
    """HPS_v2_compressed.pt with tokenizer/ beside it -> the file. Two heads of 80 numbers, as ViT-H's are."""
    state = clip_model("gelu").state_dict()
    text = {n: t for n, t in state.items() if n.startswith("text_model.")}
    vision = {
        n.replace("vision_model.", "text_model."): t
        for n, t in state.items()
        if n.startswith("vision_model.")
    }
    place = vision["text_model.embeddings.position_embedding.weight"]
    tower = open_clip_text(
        {
            **vision,
            "text_model.embeddings.token_embedding.weight": place,
            "text_model.final_layer_norm.weight": place,
            "text_model.final_layer_norm.bias": place,
        },
        2,
    )
    new = {
        **open_clip_text(text, 2),
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    new |= {f"visual.{n}": t for n, t in tower.items() if n.startswith("transformer.")}
    new |= {
        "visual.class_embedding": vision["text_model.embeddings.class_embedding"],
        "visual.positional_embedding": place,
        "visual.conv1.weight": vision["text_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for part in ("weight", "bias"):
        new[f"visual.ln_pre.{part}"] = vision[f"text_model.pre_layrnorm.{part}"]
        new[f"visual.ln_post.{part}"] = vision[f"text_model.post_layernorm.{part}"]
    write_clip_tokenizer(folder / "tokenizer")
    torch.save({"state_dict": {n: t.contiguous() for n, t in new.items()}}, folder / "HPS_v2_compressed.pt")
    return folder / "HPS_v2_compressed.pt"
