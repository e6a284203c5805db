"""A Hunyuan3D-2.1 with random weights in its published files, small enough for a test.

It has sets of 7 latents of 4 channels and images of 28 pixels.
"""

import torch
import yaml

from eg3d_rlhf.models.dino import Dino
from eg3d_rlhf.models.hunyuan3d import Denoiser, ShapeDecoder, ShapeEncoder
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
from eg3d_rlhf.tuning.flow.families import hunyuan3d_files as layout

LATENTS = 7
C = 4
L = 5
E = 8
NAMES = ("chair", "lamp", "tree", "boat")
CONTENT = {
    "model": {
        "target": "hy3dshape.models.denoisers.hunyuandit.HunYuanDiTPlain",
        "params": {
            "input_size": LATENTS,
            "in_channels": C,
            "hidden_size": 16,
            "context_dim": E,
            "depth": 5,
            "num_heads": 4,
            "qk_norm": True,
            "text_len": L,
            "with_decoupled_ca": False,
            "use_attention_pooling": False,
            "qk_norm_type": "rms",
            "qkv_bias": False,
            "use_pos_emb": False,
            "num_moe_layers": 2,
            "num_experts": 3,
            "moe_top_k": 2,
        },
    },
    "vae": {
        "target": "hy3dshape.models.autoencoders.ShapeVAE",
        "params": {
            "num_latents": LATENTS,
            "embed_dim": C,
            "num_freqs": 2,
            "include_pi": False,
            "heads": 2,
            "width": 8,
            "num_encoder_layers": 1,
            "num_decoder_layers": 2,
            "qkv_bias": False,
            "qk_norm": True,
            "scale_factor": 0.5,
            "geo_decoder_mlp_expand_ratio": 2,
            "geo_decoder_downsample_ratio": 1,
            "geo_decoder_ln_post": True,
            "point_feats": 4,
            "pc_size": 200,
            "pc_sharpedge_size": 0,
        },
    },
    "conditioner": {
        "target": "hy3dshape.models.conditioner.SingleImageEncoder",
        "params": {
            "main_image_encoder": {
                "type": "DinoImageEncoder",
                "kwargs": {
                    "config": {
                        "hidden_size": E,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "mlp_ratio": 2,
                        "image_size": 28,
                        "patch_size": 14,
                        "layer_norm_eps": 1e-6,
                        "hidden_act": "gelu",
                        "layerscale_value": 1.0,
                        "attention_probs_dropout_prob": 0.0,
                    },
                    "image_size": 28,
                    "use_cls_token": True,
                },
            }
        },
    },
    "scheduler": {
        "target": "hy3dshape.schedulers.FlowMatchEulerDiscreteScheduler",
        "params": {"num_train_timesteps": 1000},
    },
    "pipeline": {"target": "hy3dshape.pipelines.Hunyuan3DDiTFlowMatchingPipeline"},
}


def write_hunyuan3d(root):
    """Write both files, the checkpoint in float16; returns the folder."""
    root.mkdir(parents=True)
    (root / layout.CONFIG).write_text(yaml.safe_dump(CONTENT))
    (root / "model.fp16.ckpt").write_bytes(b"")
    settings = layout.read_files(root)
    torch.manual_seed(0)
    dino = Dino(settings.encoder).state_dict()
    sections = {
        "model": Denoiser(settings.model).state_dict(),
        "vae": ShapeDecoder(settings.vae).state_dict(),
        "conditioner": {layout.ENCODER + name: 0.1 * torch.randn_like(x) + x for name, x in dino.items()},
    }
    sections["vae"] |= ShapeEncoder(settings.vae).state_dict()
    sections = {
        section: {name: tensor.half() for name, tensor in tensors.items()}
        for section, tensors in sections.items()
    }
    torch.save(sections, root / "model.fp16.ckpt")
    return root


def tokens(names=NAMES) -> Conditioning:
    """Make random embeddings."""
    g = torch.Generator().manual_seed(5)
    return Conditioning(
        tokens={name: {"main": torch.randn(L, E, generator=g)} for name in names}, zero_null=True
    )
