"""Write values of the other rewards and generators by this project's own code, with other clouds, depth maps,
cameras and networks; see make_set.

Left out: SphereHead, the table of names of one point network, the double precision of another, views of depth
maps, and aggregates of ensembles.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from eg3d_rlhf.models.resnet50 import ResNet50
from eg3d_rlhf.preferences.losses import cs_divergence, median_distance
from eg3d_rlhf.rewards.aggregates import Aggregate
from eg3d_rlhf.rewards.depth import nearness
from eg3d_rlhf.tuning.gan.phase import floor_loss
from tests.compat import test_zoo_depth, test_zoo_generators, test_zoo_misc, test_zoo_points
from tests.compat.test_zoo_points import gradient_row, network_of, run_on
from training.fullhead import HyPlaneHeadGenerator, PanoHeadGenerator

SENTENCE = (
    "every state_dict entry except resample_filter := RandomState(crc32(salt+'G.'+name)), times:"
    " backbone.mapping.fc*.weight 80 and .bias 12; t_mapping.fc1.* 0.03; affine.bias 1+0.2r; other .bias and"
    " noise_strength 0.15; w_avg 0.4; decoder.net.2.weight row 0 x30"
)


def make(root: Path, seed: int) -> None:
    folder = root / "reward_zoo"
    folder.mkdir(parents=True, exist_ok=True)
    points(folder, seed)
    depth(folder, seed)
    generators(folder, seed)
    misc(folder, seed)


def table(path: Path, state: dict) -> None:
    """Write names and shapes of a state dict."""
    rows = ["index\tname\tshape\tdtype\tnumel"]
    for i, (name, value) in enumerate(state.items()):
        shape = "x".join(map(str, value.shape)) or "scalar"
        rows.append(f"{i}\t{name}\t{shape}\t{str(value.dtype).removeprefix('torch.')}\t{value.numel()}")
    path.write_text("\n".join(rows) + "\n")


def write(folder: Path, name: str, recipe: dict, arrays: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(recipe, indent=1))
    stored = {
        key: value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for key, value in arrays.items()
    }
    np.savez_compressed(folder / f"{name}.npz", **stored)


def points(folder: Path, seed: int) -> None:
    """Write a PointNet of three clouds, a small PointNet++, and a CurveNet, under other names."""
    salt = f"zoo {seed}:"
    small = {"trunk": [40, 40], "embedding": 24, "heads": [12, 8]}
    nets = {
        "cloudnet": (
            "pointnet",
            {"seeds": [seed, 70 + seed, 9], "n_points": 700, "gain": 1.1, "options": {}},
        ),
        "balls": (
            "pointnet2",
            {
                "seeds": [40 + seed, 3],
                "n_points": 500,
                "gain": 1.3,
                "options": {
                    "ratios": [0.4, 0.5],
                    "radii": [0.25, 0.5],
                    "limit": 24,
                    "first": [16, 24],
                    "second": [24, 40],
                    "whole": [40, 64],
                    **small,
                },
            },
        ),
        "curvenet2": (
            "curvenet",
            {
                "seeds": [60 + seed, 5],
                "n_points": 1100,
                "gain": 1.4,
                "options": {"k": 12, "curves": 30, **small},
                "moved_by_the_correct_mix": [1e-5, 0.8],
            },
        ),
    }
    for name, (kind, case) in nets.items():
        case["salt"] = salt
        cloud = test_zoo_points.clouds_of(case)
        arrays: dict = {"cloud_check": cloud[:, :, :6]}
        for prefix, dtype in test_zoo_points.PRECISIONS.items():
            if prefix and name == "balls":
                continue
            for mode in ("eval", "train"):
                ran = run_on(network_of(kind, case, dtype), cloud, mode)
                arrays |= {f"{prefix}{mode}_{key}": value for key, value in ran["values"].items()}
                gradients = ran["gradients"]
                arrays["grad_names"] = np.array(list(gradients))
                arrays[f"{prefix}{mode}_grad"] = np.array(
                    [gradient_row(entry, gradient) for entry, gradient in gradients.items()]
                )
                if mode == "train":
                    running = {key: v for key, v in ran["state"].items() if re.search("running_", key)}
                    arrays["bn_names"] = np.array(list(running))
                    arrays["bn_sum_after_train"] = [float(v.double().sum()) for v in running.values()]
        model = network_of(kind, case)
        if kind == "pointnet":
            arrays["eval_argmax"] = test_zoo_points.largest_points(model, cloud)
            table(folder / f"{name}_state_dict.tsv", model.state_dict())
        elif kind == "pointnet2":
            values = test_zoo_points.grouping(model, cloud)
            arrays |= {key: v[::7] if key.endswith("_sub") else v for key, v in values.items()}
            del arrays["ball1_uncut_counts"]
        else:
            table(folder / f"{name}_state_dict.tsv", model.state_dict())
            double = network_of(kind, case, torch.float64)
            for stage, value in test_zoo_points.curve_stages(double, cloud.double()).items():
                key = "l0" if stage == "lpfa" else stage
                arrays |= {f"eval_{key}_shape": list(value.shape), f"eval_{key}_sub": value[:, ::9, ::40]}
        write(folder, name, case, arrays)


def depth(folder: Path, seed: int) -> None:
    """Write two views of three samples, without double precision."""
    about = {
        "salt": f"maps {seed}:",
        "seeds": [seed, 31, 77],
        "depth": "depth map [90,90] of seed s, view v: r=RandomState(500*s+v)",
        "common": (
            "backbone names carry the prefix 'B:', gain 1.3, heads have salt+name, gain 0.9. prep = first"
            " view after resize 224, (d-2.2)/1.15, 1-d"
        ),
    }
    views = 2
    v = f"v{views}_"
    pixels, *ends = test_zoo_depth.preparation(about)
    maps = test_zoo_depth.depth_maps(about, views).requires_grad_()
    prepared = F.interpolate(maps[:, 0].detach(), size=(pixels, pixels), mode="bilinear", align_corners=False)
    prepared = nearness(prepared, *ends)
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "resnet50.pth"
        test_zoo_depth.write_backbone(about, file)
        model = test_zoo_depth.network(about, file, views)
    observed = nearness(maps, *ends)
    out = model(observed)
    out.scalar.sum().backward()
    arrays = {
        "dmap_check": maps[:, 0, 0, ::15, ::15],
        f"{v}prep_sub": prepared[..., ::9, ::9],
        f"{v}prep_stats": [float(x) for x in (prepared.min(), prepared.max(), prepared.sum())],
        f"{v}feat": out.embedding,
        f"{v}scalar": out.scalar,
        f"{v}pairs": model.pair_logits(out.embedding[:1], out.embedding[1:2]),
        f"{v}input_grad_sub": maps.grad[..., ::5, ::5],
    }
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("external.")}
    arrays[f"{v}grad_names"] = np.array(list(trained))
    arrays[f"{v}grad"] = np.array([gradient_row(name, p.grad) for name, p in trained.items()])
    write(folder, "depth_two_views", about, arrays)
    table(folder / "depth_two_views_heads_state_dict.tsv", model.state_dict())
    backbone = {f"resnet50.{name}": value for name, value in ResNet50().state_dict().items()}
    table(folder / "depth_resnet50_state_dict.tsv", backbone)


def kwargs_of(z_dim: int, rendering: dict) -> dict:
    return {
        "z_dim": z_dim,
        "c_dim": 25,
        "w_dim": 512,
        "img_resolution": 128,
        "img_channels": 3,
        "sr_num_fp16_res": 0,
        "mapping_kwargs": {"num_layers": 3},
        "rendering_kwargs": {
            "image_resolution": 128,
            "disparity_space_sampling": False,
            "clamp_mode": "softplus",
            "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
            "c_gen_conditioning_zero": False,
            "gpc_reg_prob": 0.6,
            "c_scale": 1,
            "superresolution_noise_mode": "none",
            "density_reg": 0.0,
            "density_reg_p_dist": 0.004,
            "reg_type": "l1",
            "decoder_lr_mul": 1,
            "decoder_activation": "none",
            "use_torgb_raw": True,
            "triplane_size": 32,
            "trans_reg": 10.0,
            "use_background": True,
            "sr_antialias": True,
            "depth_resolution": 9,
            "depth_resolution_importance": 7,
            "ray_start": 2.1,
            "ray_end": 3.4,
            "box_warp": 1.2,
            "avg_camera_radius": 2.5,
            "avg_camera_pivot": [0, 0, 0],
            **rendering,
        },
        "sr_kwargs": {"channel_base": 512, "channel_max": 16, "fused_modconv_default": "inference_only"},
        "channel_base": 512,
        "channel_max": 16,
        "fused_modconv_default": "inference_only",
        "num_fp16_res": 0,
        "conv_clamp": None,
    }


HEADS = {  # file: class here, class there, shape of the planes, case, latent length, how it renders
    "pano_generator": (
        PanoHeadGenerator,
        "TriPlaneGenerator",
        (3, 3, 96, 9, 11),
        ("d2", 12, {"triplane_depth": 2}),
    ),
    "hyplane_generator2": (
        HyPlaneHeadGenerator,
        "TriPlaneSingSphGenerator_flatten",
        (1, 4, 32, 8, 8),
        (
            "half",
            20,
            {
                "triplane_depth": 1,
                "multiplane_num": 1,
                "render_mode": "TriPlane_SingSph_flatten",
                "sph2cir_flag": False,
                "cir2squ_flag": False,
            },
        ),
    ),
}


def generators(folder: Path, seed: int) -> None:
    """Write one PanoHead with two slices, and one HyPlaneHead, at points of their own."""
    random = np.random.RandomState(seed + 300)
    for file, (cls, name, planes, (case, z_dim, rendering)) in HEADS.items():
        kwargs = kwargs_of(z_dim, rendering)
        about = {
            "class_name": f"training.triplane.{name}",
            "kwargs": kwargs,
            "decoder_net_2_bias_0": round(20 + random.rand(), 3),
        }
        shape = ", ".join(map(str, planes))
        recipe = {
            "sampler": (
                f"planes RandomState({seed + 41}).standard_normal({shape}) f32; points = the array points,"
                " box_warp 1.1; features [N, planes, M, 32] (channels ::5 stored); cotangent"
                f" RandomState({seed + 42}), d_planes_proj = [norm, <grad, RandomState({seed + 43})>]"
            ),
            case: about,
            "salt": f"heads {seed}:",
            "seeds": [seed + 8, 1, 90],
            "weights": SENTENCE,
            "cameras": (
                "look-at (0,0.05,0), radius 2.5, fov 20.5 (normalised intrinsics); cameras yaw -0.3 and 1.9,"
                " pitch pi/2+0.1; render 12x12, psi 0.6, cutoff 9"
            ),
        }
        told = test_zoo_generators.Recipe(recipe)
        G = cls(**kwargs).eval().requires_grad_(False)
        test_zoo_generators.set_weights(G, about, told)
        places = random.uniform(-0.5, 0.5, (1, 150, 3)).astype(np.float32)
        features, of_planes, of_points = test_zoo_generators.sampled(G, told, places)
        out = test_zoo_generators.compute(G, told, torch.from_numpy(places))
        ws = out["ws"]
        stored = {
            "sample_features_sub": features[..., ::5],
            "sample_sum": test_zoo_generators.totals(features),
            "sample_d_planes_proj": test_zoo_generators.projected(of_planes, told),
            "sample_d_points": of_points[0],
            "ws_sub": ws[:, [0, 1, 2, 3, ws.shape[1] - 1]],
            "num_ws": ws.shape[1],
            "delta_c": out["delta_c"],
            "c_after": out["c_after"],
            "image_raw": out["image_raw"],
            "image_depth": out["image_depth"],
            "image_mask": out["image_mask"],
            "adapted_image_raw_sum": test_zoo_generators.totals(out["adapted_image_raw"]),
            "image_sub": out["image"][:, :, ::6, ::6],
            "sigma": out["sigma"],
            "rgb_sub": out["rgb"][:, ::7, ::5],
        }
        write(folder, file, recipe, {f"{case}/{k}": v for k, v in stored.items()} | {"points": places})
        table(folder / f"{file.replace('_generator', '')}_{case}_state_dict.tsv", G.state_dict())


def misc(folder: Path, seed: int) -> None:
    """Write other cameras, clouds, floors and divergences, and fewer aggregates."""
    random = np.random.RandomState(seed + 400)
    recipe = {
        "seed": 60 + seed,
        "note": (
            "triple_cameras: yaw +0.7,0.1,-0.5,-1.3 rad, look-at (0,0.1,0.15), radius 2.5, fov 21.5 deg."
            " lifted = origin + depth*direction at pixel centres, row-major, camera 2."
        ),
    }
    cameras = test_zoo_misc.cameras_of(recipe).cameras()
    maps = (2.5 + 0.2 * random.standard_normal((18, 18))).astype(np.float32)
    depth = torch.from_numpy(maps)[None, None].requires_grad_()
    lifted, chosen, scaled = test_zoo_misc.normalised(depth, cameras[2:3], 70)
    shape = scaled.shape[1:]
    cotangent = np.random.RandomState(recipe["seed"] + 1).standard_normal(shape).astype(np.float32)
    (scaled * torch.from_numpy(cotangent)).sum().backward()
    arrays = {"triple_cameras": cameras, "depth": maps, "lifted": lifted[0], "subsampled": chosen[0]}
    arrays |= {"scaled": scaled[0], "depth_grad_of_scaled": depth.grad[0, 0]}
    near = torch.from_numpy(maps)[None].requires_grad_()
    loss = floor_loss(near, 2.4, only_violators=True)
    loss.sum().backward()
    arrays |= {"nose_floor": 2.4, "nose_loss": loss[0], "nose_grad": near.grad[0]}
    arrays["projector_lr"] = [test_zoo_misc.learning_rate(step, 240) for step in range(240)]
    for i, (m, n, d) in enumerate([(12, 9, 3), (7, 15, 6), (20, 20, 2)]):
        x, y = (torch.from_numpy(random.standard_normal((size, d))).requires_grad_() for size in (m, n))
        sigma = 0.8 + 0.2 * i
        divergence = cs_divergence(x, y, sigma)
        divergence.backward()
        arrays |= {f"cs{i}_x": x, f"cs{i}_y": y, f"cs{i}_sigma": sigma, f"cs{i}_v": divergence}
        arrays |= {
            f"cs{i}_dv_dx": x.grad,
            f"cs{i}_dv_dy": y.grad,
            f"cs{i}_u": cs_divergence(x, y, sigma, "U"),
        }
        unit = [F.normalize(points.detach()) for points in (x, y)]
        if i != 1:
            arrays[f"cs{i}_v_normalised"] = cs_divergence(*unit, sigma)
            arrays[f"cs{i}_median_distance_normalised"] = median_distance(torch.cat(unit))
    scores = torch.from_numpy(random.standard_normal((4, 9))).requires_grad_()
    weights = random.standard_normal(9)
    arrays |= {"members": scores, "cotangent": weights}
    for name, kind, strength in (
        ("mean", "mean", None),
        ("lcb_std0.7", "lcb", 0.7),
        ("softmin_beta3", "softmin", 3.0),
    ):
        joined = Aggregate(kind, strength)(scores)
        (gradient,) = torch.autograd.grad((joined * torch.from_numpy(weights)).sum(), scores)
        arrays |= {f"agg_{name}": joined, f"agg_grad_{name}": gradient}
    write(folder, "misc", recipe, arrays)
