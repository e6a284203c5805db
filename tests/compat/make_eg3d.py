"""Write EG3D's values by this project's own code, with other networks, seeds and settings; see make_set.

Left out: the full-size network, its tables, one phase and one statistic of the losses, the filters of the
augmentation, and cameras of the pose samplers.
"""

import json
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from tests.compat import test_augment, test_losses, test_networks, test_ops
from tests.compat.reference import Draws, build, set_weights
from tests.pictures import png, write_zip
from torch_utils.ops import bias_act, upfirdn2d
from training.dataset import ImageFolderDataset, InfiniteSampler
from training.rendering import cameras

TAPS = [1, 2, 2, 1]
# the cases of ops: settings, and shapes of the inputs
OPS = {
    "upfirdn2d/a": (
        {"op": "upfirdn2d", "setup_filter_input": TAPS, "up": [1, 2], "down": 1, "padding": [1, 0, -1, 2]},
        {"x": (1, 2, 7, 10)},
    ),
    "downsample2d/b": (
        {"op": "downsample2d", "setup_filter_input": [1, 4, 1], "gain": 0.7},
        {"x": (2, 1, 8, 6)},
    ),
    "bias_act/lrelu/c": (
        {"op": "bias_act", "act": "lrelu", "gain": 0.9, "clamp": 0.8, "alpha": 0.15},
        {"x": (3, 5, 4), "b": (5,)},
    ),
    "bias_act/swish/d": ({"op": "bias_act", "act": "swish", "dim": 2}, {"x": (3, 2, 4), "b": (4,)}),
    "conv2d_resample/e": (
        {"op": "conv2d_resample", "filter": TAPS, "up": 2, "down": 1, "padding": 1, "flip_weight": False},
        {"x": (1, 3, 6, 7), "w": (4, 3, 3, 3)},
    ),
    "modulated_conv2d/f": (
        {
            "op": "modulated_conv2d",
            "filter": TAPS,
            "up": 1,
            "padding": 1,
            "demodulate": True,
            "flip_weight": True,
            "fused_modconv": False,
        },
        {"x": (3, 2, 5, 4), "weight": (5, 2, 3, 3), "styles": (3, 2)},
    ),
    "minibatch_std/g": ({"op": "minibatch_std", "group_size": 3, "num_channels": 2}, {"x": (6, 4, 3, 3)}),
    "filtered_resizing/h": (
        {"op": "filtered_resizing antialiased (bilinear)", "size": 11},
        {"x": (2, 3, 29, 29)},
    ),
}


def make(root: Path, seed: int) -> None:
    folder = root / "eg3d"
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed + 500)
    ops(folder, random)
    misc(folder, random, seed)
    network(folder, "small_c", settings(24, 6), random, seed, stored=True)
    network(folder, "small_d", settings(40, 4, conditioned=False), random, seed, stored=False)


def normal(random: np.random.RandomState, shape) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def numbers(value) -> np.ndarray:
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else np.asarray(value)


def ops(folder: Path, random: np.random.RandomState) -> None:
    recipe = {}
    arrays = {}
    for case, (attributes, shapes) in OPS.items():
        given = {f"in_{name}": torch.from_numpy(normal(random, shape)) for name, shape in shapes.items()}
        out = test_ops.derivatives(attributes, given)["out"]
        given["dy"] = torch.from_numpy(normal(random, out.shape))
        if not case.startswith("bias_act"):  # these have first derivatives alone
            given |= {f"v_{name}": torch.from_numpy(normal(random, shape)) for name, shape in shapes.items()}
        computed = {k: v for k, v in test_ops.derivatives(attributes, given).items() if v is not None}
        arrays |= {f"{case}/{key}": numbers(value) for key, value in {**given, **computed}.items()}
        recipe[case] = dict(attributes)
        if "setup_filter_input" in attributes:
            taps = upfirdn2d.setup_filter(attributes["setup_filter_input"])
            recipe[case]["prepared_filter"] = taps.tolist()
        if "act" in attributes:
            spec = bias_act.activation_funcs[attributes["act"]]
            recipe[case] |= {"def_alpha": spec.def_alpha, "def_gain": spec.def_gain}
    (folder / "ops.json").write_text(json.dumps(recipe, indent=1))
    np.savez_compressed(folder / "ops.npz", **arrays)


def misc(folder: Path, random: np.random.RandomState, seed: int) -> None:
    """Write cameras, augmentation, the order of images and a subset of them."""
    arrays: dict[str, np.ndarray] = {}
    for name in ("front", "side", "above"):
        h, v, radius = random.uniform([0.5, 1, 1.5], [2.5, 2, 3])
        pivot = torch.from_numpy(normal(random, 3) / 10)
        pose = cameras.LookAtPoseSampler.sample(h, v, pivot, radius=radius)[0]
        arrays |= {f"lookat/{name}/hvr": np.array([h, v, radius]), f"lookat/{name}/pivot": pivot.numpy()}
        arrays[f"lookat/{name}/c2w"] = pose.numpy()
    angles = random.uniform(8, 80, 3)
    arrays["fov"] = np.array([[angle, float(cameras.FOV_to_intrinsics(angle)[0, 0])] for angle in angles])
    recipe: dict = {"sampler": {"n": 23, "seed": seed + 6}}
    for name, kwargs, shape in (
        ("aug/geometry", {"rotate": 1, "scale": 1, "aniso": 1, "rotate_max": 0.4}, "2,3,24,24"),
        ("aug/colour", {"hue": 1, "contrast": 1, "saturation": 1, "imgfilter": 1}, "4,3,26,26"),
    ):
        case = {
            "kwargs": kwargs,
            "p": 0.7,
            "input": f"RandomState({seed + 90}).random_sample(({shape}))*2-1",
            "draw_base": 3000 + 100 * seed,
        }
        pipe, images = test_augment.build(case)
        with Draws(case["draw_base"]).injected() as draws:
            arrays[f"{name}/out"] = pipe(images).numpy()
        case["draws"] = [[*draw, "here"] for draw in draws.log]
        recipe[name] = case
    with Draws(case["draw_base"]).injected():
        arrays["aug/colour/debug_percentile_0.45"] = pipe(images, debug_percentile=0.45).numpy()
    for replicas, rank in ((3, 2), (1, 0)):
        sampler = InfiniteSampler(range(23), seed=seed + 6, num_replicas=replicas, rank=rank)
        arrays[f"sampler/replicas{replicas}_rank{rank}"] = np.array(list(islice(sampler, 50)))
    arrays[f"dataset/raw_idx_n14_max6_seed{seed + 3}"] = subset(14, 6, seed + 3)
    (folder / "misc.json").write_text(json.dumps(recipe, indent=1))
    np.savez_compressed(folder / "misc.npz", **arrays)


def subset(count: int, most: int, seed: int) -> np.ndarray:
    """Record which images of a set are chosen, and that none is mirrored."""
    entries = {f"{i:03d}.png": png(np.full((4, 4, 3), i, np.uint8)) for i in range(count)}
    with tempfile.TemporaryDirectory() as work:
        path = write_zip(Path(work) / "set.zip", entries)
        data = ImageFolderDataset(path, use_labels=False, max_size=most, random_seed=seed)
        chosen = [int(data[i][0].max()) for i in range(len(data))]
    return np.array([chosen, [0] * len(chosen)])


def settings(z_dim: int, channels: int, conditioned: bool = True) -> dict:
    """Return the constructor arguments of a small generator and discriminator."""
    sizes = {"channel_base": 64 * channels, "channel_max": channels}
    rendering = {
        "image_resolution": 128,
        "disparity_space_sampling": False,
        "clamp_mode": "softplus",
        "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
        "c_gen_conditioning_zero": not conditioned,
        "gpc_reg_prob": 0.7 if conditioned else None,
        "c_scale": 1,
        "superresolution_noise_mode": "none",
        "density_reg": 0.4,
        "density_reg_p_dist": 0.006,
        "reg_type": "l1",
        "decoder_lr_mul": 0.8,
        "sr_antialias": True,
        "depth_resolution": 7,
        "depth_resolution_importance": 6,
        "ray_start": 2.2,
        "ray_end": 3.4,
        "box_warp": 1.1,
        "avg_camera_radius": 2.6,
        "avg_camera_pivot": [0, 0.1, 0.1],
    }
    G = {
        "class_name": "training.triplane.TriPlaneGenerator",
        "z_dim": z_dim,
        "w_dim": 512,
        "c_dim": 25,
        "img_resolution": 128,
        "img_channels": 3,
        "mapping_kwargs": {"num_layers": 1 if conditioned else 3},
        **sizes,
        "fused_modconv_default": "inference_only",
        "rendering_kwargs": rendering,
        "num_fp16_res": 0,
        "conv_clamp": None,
        "sr_num_fp16_res": 4,
        "sr_kwargs": {**sizes, "fused_modconv_default": "inference_only"},
    }
    D = {
        "class_name": "training.dual_discriminator.DualDiscriminator",
        "c_dim": 25,
        "img_resolution": 128,
        "img_channels": 3,
        "block_kwargs": {"freeze_layers": 0},
        "mapping_kwargs": {"num_layers": 2},
        "epilogue_kwargs": {"mbstd_group_size": 3},
        **sizes,
        "disc_c_noise": 0,
        "num_fp16_res": 4,
        "conv_clamp": 256,
    }
    return {"G": G, "D": D, "neural_rendering_resolution": 18 if conditioned else 24}


def labels(random: np.random.RandomState, count: int) -> torch.Tensor:
    """Sample cameras [N, 25] around the front."""
    poses = [
        cameras.LookAtPoseSampler.sample(
            *(np.pi / 2 + random.uniform(-0.4, 0.4, 2)), torch.tensor([0, 0.1, 0.1]), radius=2.6
        )
        for _ in range(count)
    ]
    return cameras.pack_label(torch.cat(poses), cameras.FOV_to_intrinsics(20.0))


def network(
    folder: Path, name: str, config: dict, random: np.random.RandomState, seed: int, stored: bool
) -> None:
    """Write a small network, whose weights are stored or made from their names with a salt and other factors.

    The stored one has losses.
    """
    case: dict = {"config": config, "inference": {"real_seed": seed + 33}}
    torch.manual_seed(seed)
    G, D = build(config)
    state = folder / f"{name}_state.npz"
    if stored:
        G.backbone.mapping.w_avg.normal_(std=0.4)
        tensors = {f"G/{key}": value for key, value in G.state_dict().items()}
        tensors |= {f"D/{key}": value for key, value in D.state_dict().items()}
        np.savez_compressed(state, **{key: value.numpy() for key, value in tensors.items()})
    else:
        case |= {"salt": f"{name} {seed}:", "fill": {"mapping_weight": 90, "w_avg": 0.2, "density_row": 25}}
        set_weights(case, state, G, D)
    count = 2 if stored else 3
    inputs = {
        "z": torch.from_numpy(normal(random, (count, config["G"]["z_dim"]))),
        "c": labels(random, count),
        "c_cond": labels(random, count),
        "points": torch.from_numpy(random.uniform(-0.5, 0.5, (count, 130, 3)).astype(np.float32)),
    }
    base = 40 + seed
    drawn = f"rng{base}_noise_random" if stored else f"rng{base}"
    keys = ["ws_psi05", "ws_psi05_cut3", "sigma_sample_psi05", f"{drawn}_image_raw_sub"]
    out = test_networks.compute(G, D, case["inference"], inputs, keys)
    case["inference"] |= {
        key: [[*draw, "here"] for draw in out[key]] for key in ("fixed_draws", f"rng{base}_draws")
    }
    image = out["image"]
    arrays = {f"in_{key}": value for key, value in inputs.items()} | {
        key: out[key] for key in ("ws", "num_ws", *keys[:3], "planes_mean", "sigma", "weights_total")
    }
    arrays |= {
        "planes_sub": out["planes"][:, :, ::20, ::20],
        "rgb": out["rgb"][:, :45] if stored else out["rgb"][:, ::9],
        "ray_origins": out["ray_origins"][:, :1],
        "ray_dirs_sub": out["ray_dirs"][:, ::13],
        "feature_samples_sub": out["feature_samples"][:, ::17],
        "image_raw": out["image_raw"],
        "image_depth": out["image_depth"],
        "image_sub": image[:, :, ::3, ::3],
        "image_crop": image[:, :, -10:, -20:],
        "D_logits_fake": out["D_logits_fake"],
        "D_logits_real": out["D_logits_real"],
        keys[3]: out[f"{drawn}_image_raw"][:, :, ::4, ::4],
    }
    np.savez_compressed(folder / f"{name}_infer.npz", **{key: numbers(v) for key, v in arrays.items()})
    if stored:
        case["losses"] = losses(folder, name, case, state, random, seed)
    (folder / f"{name}.json").write_text(json.dumps(case, indent=1))


def losses(
    folder: Path, name: str, about: dict, state: Path, random: np.random.RandomState, seed: int
) -> dict:
    """Record one case of three phases, with the weights restored before each."""
    case: dict = {
        "loss_kwargs": {
            "class_name": "training.loss.StyleGAN2Loss",
            "r1_gamma": 2.5,
            "style_mixing_prob": 0,
            "blur_init_sigma": 6,
            "blur_fade_kimg": 150,
            "gpc_reg_prob": 0.7,
            "gpc_reg_fade_kimg": 500,
            "dual_discrimination": True,
            "filter_mode": "antialiased",
            "neural_rendering_resolution_initial": 16,
            "neural_rendering_resolution_final": 20,
            "neural_rendering_resolution_fade_kimg": 300,
        },
        "cur_nimg": 120_000 + 1000 * seed,
        "batch": 3,
        "real_seed": 70 + seed,
        "phases": {
            "Gmain": {"draw_base": 500, "gain": 1},
            "Greg": {"draw_base": 600 + seed, "gain": 2},
            "Dreg": {"draw_base": 700, "gain": 8},
        },
    }
    z_dim = about["config"]["G"]["z_dim"]
    inputs = [labels(random, 3).numpy(), normal(random, (3, z_dim)), labels(random, 3).numpy()]
    arrays = {f"early/in_{key}": value for key, value in zip(test_losses.INPUTS, inputs, strict=True)}
    for phase, spec in case["phases"].items():
        G, D = build(about["config"])
        set_weights(about, state, G, D)
        batch = test_losses.batch_of(case, inputs, G.img_resolution)
        stats, drawn = test_losses.run_phase(G, D, case, phase, batch)
        stats.pop("Loss/signs/fake", None)
        spec |= {"draws": [[*draw, "here"] for draw in drawn], "stats": sorted(stats)}
        arrays |= {f"early/{phase}/stat/{key}": value for key, value in stats.items()}
        for key, parameter in (G if phase[0] == "G" else D).named_parameters():
            if parameter.grad is None:
                arrays[f"early/{phase}/grad/none/{key}"] = np.zeros(0)
            else:
                row = test_losses.gradient_row(key, parameter.grad.double().numpy())
                arrays[f"early/{phase}/grad/{key}"] = np.array(row)
    np.savez_compressed(folder / f"{name}_losses.npz", **arrays)
    return {"early": case}
