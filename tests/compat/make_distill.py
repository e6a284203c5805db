"""Write values of score distillation by this project's own code, with other sizes; see make_set."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import trimesh
from torch.nn.functional import linear

from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.interfaces import Mesh, Patches
from eg3d_rlhf.generators.assets.views import network_cameras, to_z_up, unit_distance, views_at
from eg3d_rlhf.models.blip import VISION, BlipSizes
from eg3d_rlhf.models.clip_inputs import clip_preprocess
from eg3d_rlhf.models.weights import empty
from eg3d_rlhf.preferences.bradley_terry import Judgement, elo
from eg3d_rlhf.preferences.losses import cs_divergence, median_distance
from eg3d_rlhf.rewards.images.reward3d import MEAN, STD, Reward3dNetwork
from eg3d_rlhf.rewards.meshes.model import MeshEncoder, masked_max
from eg3d_rlhf.rewards.meshes.patchifiers import face_features, to_frame
from eg3d_rlhf.rewards.meshes.settings import EncoderOptions
from eg3d_rlhf.rewards.meshes.surfaces import Lattice, cube, marching_tetrahedra, signed_volume
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.gradients import digits, distillation_loss, target_loss
from eg3d_rlhf.tuning.distill.guidance.denoiser import DIRECTIONS, view_direction
from eg3d_rlhf.tuning.distill.guidance.dreamdpo import DreamDpo
from eg3d_rlhf.tuning.distill.guidance.dreamreward import DreamReward
from eg3d_rlhf.tuning.distill.guidance.rewardsds import RewardSds
from eg3d_rlhf.tuning.distill.guidance.settings import NoiseWeighting
from eg3d_rlhf.tuning.distill.methods import PRESETS
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, ddim_times, make_betas
from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS, Ramp, TimeWindow
from tests.compat.distill_reference import Pictures, Recorded, StandIn, filled, seen_by
from tests.compat.making import Maker
from tests.models.published_names import published

VIEWS = 2
SCALE = 0.3127  # of latents
CHANNELS = 3
SIDE = 5
SCHEDULE = NoiseSchedule()


def make(root: Path, seed: int) -> None:
    """Write all files but mvdream_unet, whose network belongs to another library, and one table."""
    for number, (name, of) in enumerate(WRITTEN.items()):
        m = Maker(seed + 110 + number)
        recipe = of(m)
        m.write(root / "distill" / f"{name}.npz")
        content = {"source": "make_set", "seed": m.seed, **recipe}
        (root / "distill" / f"{name}.json").write_text(json.dumps(content, indent=1))
    (root / "distill" / "params").mkdir(exist_ok=True)
    network = empty(lambda: Reward3dNetwork("Scorer", BlipSizes()))
    state = published(network.state_dict(), VISION)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    shapes["blip.text_encoder.embeddings.position_ids"] = [1, 512]
    rows = [f"{name}\t{'x'.join(map(str, shape))}" for name, shape in shapes.items()]
    (root / "distill" / "params" / "Reward3D_Scorer.tsv").write_text("\n".join(rows) + "\n")


def divergences(m: Maker) -> dict:
    for name, (rows, others, size, sigma) in {"a": (7, 11, 3, 0.8), "b": (4, 4, 6, 2.5)}.items():
        x = m.normal(rows, size).double().requires_grad_()
        y = (0.5 + m.normal(others, size)).double().requires_grad_()
        divergence = cs_divergence(x, y, sigma)
        divergence.backward()
        kernel = (-torch.cdist(x.detach(), y.detach()).square() / (2 * sigma**2)).exp()
        made = {"x": x, "y": y, "sigma": sigma, "divergence": divergence, "d_dx": x.grad, "d_dy": y.grad}
        made["kernel_xy"] = kernel
        if name == "a":
            made["median_squared_distance"] = median_distance(torch.cat([x, y])) ** 2
        m.add(made, f"cs/{name}/")
    return {"cases": {}}


# Guidances, by the stand-in prior.


def stand_in(m: Maker, prefix: str = "net/", views: int = VIEWS) -> StandIn:
    """Store the arrays of a stand-in prior that knows "text" and the empty prompt, and return the prior."""
    width = 4
    arrays = {name: m.normal(CHANNELS, SIDE, SIDE, scale=0.5) for name in ("net_P", "net_Q")}
    arrays |= {name: m.normal(width, scale=0.3) for name in ("net_u", "net_v")}
    arrays |= {"net_r": torch.tensor(0.15), "net_cam": m.normal(16, scale=0.1)}
    arrays |= {"vae_E": m.normal(CHANNELS, 3), "vae_Dm": m.normal(3, CHANNELS, scale=0.4)}
    told = {"cond": m.normal(1, 2, width), "null": m.normal(1, 2, width)}
    m.add(arrays | told, prefix)
    known = {"text": told["cond"][0], "": told["null"][0]}
    return StandIn(arrays, SCHEDULE.alphas_cumprod, known, views, SCALE)


def cameras(m: Maker, count: int) -> torch.Tensor:
    made = torch.eye(4).repeat(count, 1, 1)
    made[:, :3, :3] = torch.linalg.qr(m.normal(count, 3, 3)).Q
    made[:, :3, 3] = m.normal(count, 3)
    return made


def latents_or_pictures(m: Maker, pictures: bool, count: int = VIEWS) -> tuple[torch.Tensor, str]:
    """Return the input of a case, channels last, and the JSON's name for it."""
    if pictures:
        return torch.rand(count, SIDE, SIDE, 3, generator=m.generator), "image NHWC in [0,1]"
    return m.normal(count, SIDE, SIDE, CHANNELS), "latents NHWC"


class Judge:
    def __init__(self, answers: list[int]):
        self.answers = answers

    def judge(self, prompts, pairs, shuffle_order=True):
        return self.answers


def dreamdpo(m: Maker) -> dict:
    prior = stand_in(m)
    w = m.normal(3, SIDE, SIDE)
    m.put(reward__w=w)
    cases = {}
    for name, scale, tau, clip, kind in (
        ("even", 5.0, 0.3, None, "recited"),
        ("of_w", 3.0, 0.002, None, "linear"),
        ("clipped", 1.0, 0.0, 0.2, "recited"),
        ("judged", 6.0, 0.1, None, "faults"),
        ("shown", 4.0, 0.05, None, "pictures"),
    ):
        given, what = latents_or_pictures(m, kind == "pictures")
        shown = given.requires_grad_()
        images = shown.permute(0, 3, 1, 2)
        x = prior.encode(images) if kind == "pictures" else images
        t = torch.tensor(237 + len(name))
        c2w = cameras(m, VIEWS)
        noises = m.normal(2, VIEWS, CHANNELS, SIDE, SIDE)
        scores = m.normal(2, VIEWS)
        reward = Pictures(w) if kind == "linear" else Pictures(recited=scores.flatten())
        counts = torch.tensor([[1, 3], [2, 1]])
        judge = Judge([int(a >= b) for a, b in counts.T.tolist()]) if kind == "faults" else None
        released = PRESETS["dreamdpo-released"]
        asked = dataclasses.replace(released.prior, guidance_scale=scale)
        settings = dataclasses.replace(released, tau=tau, prior=asked)
        guidance = DreamDpo(
            prior, settings, views=VIEWS, streams=Recorded(*noises), reward=reward, judge=judge
        )
        output = guidance(x.detach(), t.expand(VIEWS), ["text"] * VIEWS, seen_by(c2w), 0)
        loss = distillation_loss(x, output, clamp=clip)
        loss.backward()
        m.add(
            {
                "input": shown,
                "c2w": c2w,
                "t": t,
                "loss_sds": loss,
                "dloss_dinput": shown.grad,
                **{f"noise_{i}": noise for i, noise in enumerate(noises, 1)},
                **{f"x0_image_{i}": image for i, image in enumerate(reward.seen.chunk(2), 1)},
                **{f"score_{i}": score for i, score in enumerate(output.scores.view(2, -1), 1)},
                **({f"judge_{i}": count for i, count in enumerate(counts, 1)} if judge else {}),
            },
            f"case/{name}/",
        )
        cases[f"case/{name}"] = {
            "guidance_scale": scale,
            "tau": tau,
            "grad_clip_val": clip,
            "neg_prompt": kind == "faults",
            "input_is": what,
            "reward": "linear" if kind == "linear" else "recited",
        }
    return {"latent_scale": SCALE, "n_view": VIEWS, "cases": cases}


class AssetReward:
    """Reward that is linear in the pictures of an asset and adds a share of its prompts' numbers."""

    modality = "multiview"
    differentiable = True
    view_prompts = True
    views = VIEWS

    def __init__(self, w: torch.Tensor, more: float):
        self.w = w
        self.more = more
        self.seen = None

    def score(self, pixels, prompts):
        self.seen = pixels.detach()
        each = (pixels * self.w).sum((1, 2, 3)) / self.w.numel()
        return (each.view(-1, VIEWS).mean(1) + self.more).repeat_interleave(VIEWS)


def dreamreward(m: Maker) -> dict:
    prior = stand_in(m)
    w = m.normal(3, SIDE, SIDE)
    m.put(reward__w=w)
    m.put(
        calculate_weight__rows=[
            [a, b, 10.0 ** (digits(a) - digits(b))] for a, b in ((31.5, 2.25), (7.0, 1234.0))
        ]
    )
    cases = {}
    for variant, step, t, rewarded in ((1, 100, 50, False), (1, 7000, 70, True), (2, 3000, 640, True)):
        ids = torch.tensor([[2], [1]])
        reward = AssetReward(w, 0.25 * float(ids.sum()))
        images = torch.rand(VIEWS, SIDE, SIDE, 3, generator=m.generator).requires_grad_()
        c2w = cameras(m, VIEWS)
        noise = m.normal(VIEWS, CHANNELS, SIDE, SIDE)
        shown = images.permute(0, 3, 1, 2)
        x = prior.encode(shown)
        settings = PRESETS[f"dreamreward-released-{variant}"]
        guidance = DreamReward(prior, settings, views=VIEWS, streams=Recorded(noise), reward=reward)
        times = torch.tensor(t).expand(VIEWS)
        output = guidance(x, times, ["text"] * VIEWS, seen_by(c2w), step, shown.detach())
        distillation_loss(x, output, images=shown).backward()
        name = f"guidance{variant}/at{step}"
        made = {"input": images, "c2w": c2w, "t": t, "noise": noise, "dloss_dinput": images.grad}
        if rewarded:
            made |= {"reward_image": reward.seen, "prompt_ids": ids, "reward": output.scores}
        m.add(made, f"{name}/")
        cases[name] = {"variant": variant, "step": step, "t": t, "rewarded": rewarded}
    parts = heads(m)
    return {"latent_scale": SCALE, "n_view": VIEWS, "prompt_share": 0.25, "cases": cases, **parts}


def heads(m: Maker) -> dict:
    """Write the scorer of Reward3D; leave out its fusion of views."""
    sizes = BlipSizes(
        image=32,
        vision_width=64,
        vision_layers=1,
        text_width=36,
        text_layers=1,
        text_hidden=64,
        vocabulary=50,
        projection=8,
    )
    network = Reward3dNetwork("Scorer", sizes).eval()
    entries = {}
    for base, (name, entry) in enumerate({"mlp": "MLP", "Scorer": "Scorer"}.items()):
        part = getattr(network, name)
        order = [[key, list(tensor.shape)] for key, tensor in part.state_dict().items()]
        entries[entry] = {"base": m.seed * 1000 + 50 * base, "scale": 0.06, "order": order}
        part.load_state_dict(filled(entries[entry]))
    features = m.normal(12, 36).requires_grad_()
    reward = network.head(features)
    reward.sum().backward()
    m.add({"features": features, "feature128": network.mlp.hidden(features)}, "scorer/")
    m.add({"reward": reward[:, None], "raw": reward[:, None] * STD + MEAN}, "scorer/")
    m.add({"dreward_dfeatures": features.grad}, "scorer/")
    m.add({"features": features, "out": network.mlp(features)}, "mlp/")
    return entries


def ratings(m: Maker) -> dict:
    cases = {}
    for name, methods, count, held in (("five", 5, 300, 0), ("held", 4, 120, 2)):
        skill = m.normal(methods)
        first = torch.randint(methods, (count,), generator=m.generator)
        second = (first + torch.randint(1, methods, (count,), generator=m.generator)) % methods
        chance = torch.sigmoid(skill[first] - skill[second])
        drawn = torch.rand(count, generator=m.generator)
        result = torch.where((drawn - chance).abs() < 0.05, 0, torch.where(drawn < chance, -1, 1))
        rows = torch.stack([first, second, result], 1)
        words = {-1: "a", 1: "b", 0: "tie"}
        judged = [Judgement(str(i), str(j), words[r]) for i, j, r in rows.tolist()]
        init = torch.arange(methods).double() * 30
        kept = {str(k): float(init[k]) for k in range(held)} or None
        rating = elo(judged, given_ratings=kept, resample_count=0)
        made = torch.tensor([rating.ratings[str(k)].elo for k in range(methods)], dtype=torch.float64)
        m.add({"comparisons": rows, "elo": made}, f"{name}/")
        if held:
            m.add({"init": init}, f"{name}/")
        cases[name] = {"methods": methods, "comparisons": count}
    return {"cases": cases}


def tetrahedra(m: Maker) -> dict:
    resolution = 4
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    one = torch.tensor([[0, 1, 2, 3]])
    m.put(tet__vertices=corners, tet__tets=one)
    for signs in (1, 6, 11):
        bits = torch.tensor([1.0 if signs >> i & 1 else -1.0 for i in range(4)])
        sdf = (bits * (0.2 + torch.rand(4, generator=m.generator))).requires_grad_()
        mesh = marching_tetrahedra(-sdf, Lattice.from_tetrahedra(corners, one, 1.0))
        weight = m.normal(*mesh.vertices.shape)
        (slope,) = torch.autograd.grad((mesh.vertices * weight).sum(), sdf)
        made = {"sdf": sdf, "verts": mesh.vertices, "faces": mesh.faces.flip(1), "weight": weight}
        m.add(made | {"dsum_dsdf": slope}, f"tet/{signs:02}/")
    lattice = cube(resolution, Bounds(centre=(0.5, 0.5, 0.5)))
    m.put(grid__vertices=lattice.vertices, grid__tets=lattice.tetrahedra)
    far = (lattice.vertices - 0.5).norm(dim=1)
    fields = {"ball": 0.37 - far, "rough": m.normal(len(far))}
    for name, field in fields.items():
        moved = m.normal(len(far), 3)
        m.add({"sdf": field, "deformation": moved}, f"{name}/")
        for kind in ("plain", "deformed") if name == "ball" else ("plain",):
            sdf = field.clone().requires_grad_()
            shift = moved.clone().requires_grad_() if kind == "deformed" else None
            vertices = lattice.vertices.clone().requires_grad_()
            mesh = marching_tetrahedra(
                -sdf, Lattice.from_tetrahedra(vertices, lattice.tetrahedra, 1 / resolution), shift
            )
            weight = m.normal(*mesh.vertices.shape)
            total = (mesh.vertices * weight).sum()
            volume = -signed_volume(mesh)
            of = vertices if shift is None else shift
            slopes = torch.autograd.grad(total, [sdf, of], retain_graph=True)
            made = {"verts": mesh.vertices, "faces": mesh.faces.flip(1), "weight": weight}
            made |= {"dsum_dsdf": slopes[0], "signed_volume": volume}
            made["dsum_dvertices" if shift is None else "dsum_ddeformation"] = slopes[1]
            made["dvolume_dsdf"] = torch.autograd.grad(volume, sdf)[0]
            m.add(made, f"{name}/{kind}/")
    return {"cases": {name: {"resolution": resolution} for name in fields}}


def meshmae(m: Maker) -> dict:
    faces_of_patch = 16
    padded = 40
    ball = trimesh.creation.icosphere(subdivisions=2)
    ball.vertices += 0.05 * m.normal(*ball.vertices.shape).numpy()
    patches = len(ball.faces) // faces_of_patch
    vertices = torch.from_numpy(np.asarray(ball.vertices))
    faces = torch.from_numpy(np.asarray(ball.faces))
    features, centres = face_features(vertices, faces, "raw")
    pick = torch.arange(patches)[:, None] + patches * torch.arange(faces_of_patch)
    made = {"vertices": vertices, "faces": faces.int(), "face_index": pick.int()}
    made |= {"feats": features[pick].permute(2, 0, 1), "centers": centres[pick]}
    m.add(made | {"normalised": to_frame(Mesh(vertices, faces), "box")}, "bumpy/")
    options = EncoderOptions(faces=faces_of_patch, width=20, depth=1, heads=4)
    encoder = MeshEncoder(options).eval()
    order = [["cls_token", [1, 1, 20]]]
    order += [[name, list(tensor.shape)] for name, tensor in encoder.state_dict().items()]
    order += [["head.weight", [40, 20]], ["head.bias", [40]]]
    entry = {"base": m.seed * 1000, "order": order}
    entry["config"] = {"channels": 10, "num_heads": 4, "encoder_depth": 1, "embed_dim": 20}
    weights = filled(entry)
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    given = m.normal(3, patches, faces_of_patch, 10)
    places = m.normal(3, patches, faces_of_patch, 3)
    zeros = [torch.cat([x[:1], x.new_zeros(1, padded - patches, *x.shape[2:])], 1) for x in (given, places)]
    with torch.no_grad():
        tokens = encoder(Patches(given, places, torch.ones(3, patches, dtype=torch.bool)))
        attended = encoder(Patches(*zeros, torch.ones(1, padded, dtype=torch.bool)))
        largest = masked_max(tokens, torch.ones(3, patches, dtype=torch.bool)).clamp_min(0)
        head = weights["head.weight"], weights["head.bias"]
        m.add({"feats": given.permute(0, 3, 1, 2), "centers": places, "tokens": tokens}, "encoder/")
        m.add(
            {"out40": linear(largest, *head), "out40_zero_padded": linear(attended.amax(1), *head)},
            "encoder/",
        )
    cases = {"bumpy": {"faces": len(ball.faces), "patches": patches}, "encoder": {}}
    return {"padded": padded, "cases": cases, "encoder": entry}


def reconstructions(m: Maker) -> dict:
    stand_in(m)
    arrays = {name.removeprefix("net/"): torch.from_numpy(x) for name, x in m.values.items()}
    cond = arrays.pop("cond")
    null = arrays.pop("null")
    cases = {}
    for name, scale, rescale, views, posed, pictures in (
        ("three", 9.0, 0.3, 3, True, False),
        ("shown", 12.0, 0.8, 2, True, True),
        ("alone", 4.0, 1.0, 2, False, False),
    ):
        count = 2 * views
        shown, what = latents_or_pictures(m, pictures, count)
        if not pictures:
            shown = shown.permute(0, 3, 1, 2).contiguous()
            what = "latents NCHW"
        shown.requires_grad_()
        prior = StandIn(arrays, SCHEDULE.alphas_cumprod, {}, views if posed else 1, SCALE)
        x = prior.encode(shown.permute(0, 3, 1, 2)) if pictures else shown
        seen = seen_by(cameras(m, count)) if posed else None
        t = torch.tensor(333)
        noise = m.normal(count, CHANNELS, SIDE, SIDE)
        with torch.no_grad():
            times = t.expand(count)
            x_t = SCHEDULE.mix(x, noise, times)
            both = [prior.predict_noise(x_t, times, e.expand(count, -1, -1), seen) for e in (cond, null)]
            x0 = SCHEDULE.x0(x_t, gradients.guided(*both, scale), times)
            target = gradients.reconstruction_target(x0, SCHEDULE.x0(x_t, both[0], times), rescale, views)
        loss = target_loss(x, gradients.reconstruction(x.detach(), target))
        loss.backward()
        made = {"input": shown, "t": t, "noise": noise, "eps_text": both[0], "eps_null": both[1]}
        made |= {"loss_sds": loss, "dloss_dinput": shown.grad}
        m.add(made | ({"camera_input": seen} if posed else {}), f"case/{name}/")
        config = {"guidance_scale": scale, "recon_std_rescale": rescale, "n_view": views}
        cases[f"case/{name}"] = {"config": config, "input_is": what}
    return {"latent_scale": SCALE, "cases": cases}


def preprocessed(m: Maker) -> dict:
    cases = {}
    for name, height, width, size in (("tall", 31, 14, 9), ("small", 6, 8, 11)):
        image = torch.rand(1, 3, height, width, generator=m.generator).requires_grad_()
        out = clip_preprocess(image, size)
        weight = m.normal(*out.shape)
        (out * weight).sum().backward()
        m.add({"image": image, "out": out, "weight": weight, "dsum_dimage": image.grad}, f"{name}/")
        cases[name] = {"size": size}
    return {"cases": cases}


def rewardsds(m: Maker) -> dict:
    prior = stand_in(m)
    w = m.normal(3, SIDE, SIDE)
    m.put(reward__w=w)
    count = 5
    given = {"rewards": m.normal(count), "losses": m.normal(count).abs(), "grad_norms": m.normal(count).abs()}
    m.add(given, f"strategy3d/{count}/")
    strategies = {
        "best2": NoiseWeighting(strategy="best", best=2),
        "minmax_.6_.2_1_2": NoiseWeighting(best_weight=0.6, worst_weight=0.2, best=1, worst=2),
        "weighted": NoiseWeighting(strategy="weighted"),
    }
    for name, weighting in strategies.items():
        weights = weighting(given["rewards"][:, None])[:, 0]
        made = {"weights": weights, "loss": (weights * given["losses"]).sum()}
        m.add(made | {"logged_norm": (weights * given["grad_norms"]).sum()}, f"strategy3d/{count}/{name}/")
    cases = {}
    for name, noises, strategy, recon, step, t in (
        ("a", 3, "best2", True, 10, 512),
        ("b", 5, "weighted", False, 0, 140),
        ("c", 4, "best2", True, 900, 333),
    ):
        explored = []
        own = StandIn(prior.net, SCHEDULE.alphas_cumprod, prior.embeddings, VIEWS, SCALE)
        decode = own.decode
        own.decode = lambda x, decode=decode, explored=explored: decode(explored.append(x) or x)
        reward = Pictures(w)
        released = PRESETS["rewardsds-released"]
        form = {} if recon else {"form": "sds"}
        settings = dataclasses.replace(
            released,
            noises=noises,
            until=800,
            explore_steps=6,
            weighting=strategies[strategy],
            prior=dataclasses.replace(released.prior, guidance_scale=20.0, **form),
        )
        used = noises if step < 800 else 1
        x = m.normal(VIEWS, CHANNELS, SIDE, SIDE).requires_grad_()
        c2w = cameras(m, VIEWS)
        noise = m.normal(used, VIEWS, CHANNELS, SIDE, SIDE)
        guidance = RewardSds(own, settings, views=VIEWS, streams=Recorded(*noise), reward=reward)
        output = guidance(x.detach(), torch.tensor(t).expand(VIEWS), ["text"] * VIEWS, seen_by(c2w), step)
        distillation_loss(x, output).backward()
        asked = torch.tensor([int(call[0]) for call in own.calls] * used)
        made = {"input": x, "c2w": c2w, "t": t, "noise": noise, "dloss_dinput": x.grad}
        made["timesteps_of_calls"] = asked
        if output.scores is not None:
            images = reward.seen.unflatten(0, (used, VIEWS))
            made |= {"rewards": output.scores[:, 0], "explored": torch.stack(explored), "images": images}
        m.add(made, f"full3d/{name}/")
        cases[f"full3d/{name}"] = {
            "guidance_scale": 20.0,
            "recon_loss": recon,
            "step": step,
            "reward_until": 800,
            "noises": noises,
            "strategy": strategy,
            "exploration_steps": 6,
        }
    return {"latent_scale": SCALE, "n_view": VIEWS, "cases": cases}


def schedules(m: Maker) -> dict:
    config = {"beta_start": 0.0012, "beta_end": 0.009, "beta_schedule": "scaled_linear"}
    other = {"beta_start": 2e-4, "beta_end": 0.015, "beta_schedule": "linear", "rescale_betas_zero_snr": True}
    betas = make_betas("scaled_linear", beta_start=0.0012, beta_end=0.009)
    schedule = NoiseSchedule((1 - betas).cumprod(0))
    bar = schedule.alphas_cumprod
    m.add({"betas": betas, "alphas_cumprod": bar, "final_alpha_cumprod": bar[0]}, "sd/")
    others = make_betas("linear", beta_start=2e-4, beta_end=0.015, zero_snr=True)
    m.add({"alphas_cumprod": (1 - others).cumprod(0)}, "own/")
    for spacing, n in itertools.product(("leading", "linspace"), (7, 30)):
        m.add({"timesteps": ddim_times(n, spacing)}, f"timesteps/{spacing}_{n}/")
    x, noise, pred = (m.normal(4, 2, 3, 3) for _ in range(3))
    t = torch.tensor([0, 20, 503, 999])
    x_t = schedule.mix(x, noise, t)
    m.add(
        {"x0": x, "noise": noise, "t": t, "x_t": x_t, "velocity": schedule.velocity(x, noise, t)}, "forward/"
    )
    for kind, n in (("epsilon", 20), ("v_prediction", 8)):
        now = torch.tensor([ddim_times(n)[2], ddim_times(n)[-1]])
        given = m.normal(2, 2, 3, 3)
        told = m.normal(2, 2, 3, 3)
        e = told if kind == "epsilon" else schedule.noise_of_velocity(given, told, now)
        made = {"t": now, "sample": given, "model_output": told}
        made |= {"prev_sample": schedule.ddim_step(given, e, now, now - STEPS // n)}
        m.add(made | {"pred_original_sample": schedule.x0(given, e, now)}, f"ddim_step/{kind}_{n}/")
    chain(m, schedule, 10)
    for views, elevation, first, span in ((3, 25, 30, 360), (2, -5, 0, 120)):
        azimuth = first + torch.arange(views, dtype=torch.float64) * span / views
        rest = [torch.full_like(azimuth, value) for value in (elevation, 1.0, 40.0)]
        same = views_at(azimuth, *rest).cameras[:, :16].reshape(-1, 4, 4)
        m.add({"blender": to_z_up(same).flatten(1)}, f"camera/n{views}_e{elevation}_a{first}_s{span}/")
        assert network_cameras(same.flatten(1)).shape == (views, 16)
    posed = cameras(m, 3)
    m.add({"camera": posed, "out": unit_distance(posed)}, "normalize_camera/")
    return {"cases": {"sd": {"config": config}, "own": {"config": other}}}


def chain(m: Maker, schedule: NoiseSchedule, n: int) -> None:
    arrays = {name: m.normal(2, 3, 3, scale=0.5) for name in ("net_P", "net_Q")}
    arrays |= {"net_u": m.normal(3, scale=0.3), "net_v": m.normal(3, scale=0.3), "net_r": torch.tensor(0.2)}
    net = StandIn(arrays, schedule.alphas_cumprod, {})
    start = m.normal(1, 2, 3, 3)
    cond = m.normal(1, 4, 3)
    null = m.normal(1, 4, 3)

    def predict(x, t):
        return gradients.guided(net.predict_noise(x, t, cond), net.predict_noise(x, t, null), 2.5)

    times = [torch.tensor([time]) for time in [*ddim_times(n), ddim_times(n)[-1] - STEPS // n]]
    made = {"x_start": start, "x_end": schedule.ddim_chain(start, times, predict), "scale": 2.5}
    m.add(arrays | made | {"cond": cond, "null": null}, f"ddim_chain/{n}/")


def threestudio(m: Maker) -> dict:
    prior = stand_in(m, views=1)
    held = {name.removeprefix("net/"): m.values.pop(name) for name in list(m.values)}
    m.add({name.removeprefix("net_"): x for name, x in held.items() if name.startswith("net_")}, "net/")
    m.add({name.removeprefix("vae_"): x for name, x in held.items() if name.startswith("vae_")}, "vae/")
    count = 3
    text = m.normal(4, 2, 4)
    null = m.normal(4, 2, 4)
    m.add({"text": text[:1], "null": null[:1], "text_vd": text, "null_vd": null}, "prompt/")
    views = [(10.0, 5.0), (70.0, 100.0), (0.0, 190.0)]
    m.put(views__elevation=[e for e, _ in views], views__azimuth=[a for _, a in views])
    index = [DIRECTIONS.index(view_direction(*view)) for view in views]
    rows = [
        [e, a, DIRECTIONS.index(view_direction(e, a))] for e, a in itertools.product((5, 65), (0, 80, 200))
    ]
    m.put(directions__rows=np.array(rows, float))
    cases = {}
    for name, config, clip, pictures in (
        ("strong", {"guidance_scale": 30.0}, None, False),
        ("even", {"guidance_scale": 3.0, "weighting_strategy": "uniform"}, 0.4, False),
        ("one_prompt", {"guidance_scale": 5.0, "view_dependent_prompting": False}, None, True),
        ("chained", {"guidance_scale": 2.0, "use_sjc": True, "var_red": False}, None, False),
    ):
        shown, what = latents_or_pictures(m, pictures, count)
        shown.requires_grad_()
        images = shown.permute(0, 3, 1, 2)
        x = prior.encode(images) if pictures else images
        t = torch.tensor([55, 402, 801])
        noise = m.normal(count, CHANNELS, SIDE, SIDE)
        several = config.get("view_dependent_prompting", True)
        told = [e[index] if several else e[:1].expand(count, -1, -1) for e in (text, null)]
        with torch.no_grad():
            bar = SCHEDULE.alpha(t, x)
            u = ((1 - bar) / bar).sqrt()
            z = x + u * noise
            sjc = config.get("use_sjc", False)
            x_t = z / (1 + u.square()).sqrt() if sjc else SCHEDULE.mix(x, noise, t)
            both = [prior.predict_noise(x_t, t, e) for e in told]
            predicted = gradients.guided(*both, config["guidance_scale"] + 1)
            weight = SCHEDULE.weight(t, config.get("weighting_strategy", "sds"), x)
            grad = (
                gradients.sjc(x, z, predicted, u, variance_reduced=config["var_red"])
                if sjc
                else gradients.sds(predicted, noise, weight)
            )
        loss = target_loss(x, grad, clamp=clip)
        loss.backward()
        made = {"input": shown, "t": t, "noise": noise, "eps_all": torch.cat(both), "loss_sds": loss}
        m.add(made | {"dloss_dinput": shown.grad}, f"case/{name}/")
        cases[f"case/{name}"] = {"config": config, "input_is": what, "grad_clip_val": clip}
    specs = {"falling": [[0, 0.9, 0.4, 500], [0, 0.7, 0.95, 300]], "rooted": [0.05, 0.9, "steps 800"]}
    windows = {
        "falling": TimeWindow(low=Ramp((0, 0.9, 0.4, 500)), high=Ramp((0, 0.95, 0.95, 300))),
        "rooted": TimeWindow(low=Ramp(0.05), high=Ramp(0.9), sqrt_anneal=800),
    }
    specs["falling"][1] = [0, 0.95, 0.95, 300]
    for name, window in windows.items():
        m.add({"rows": np.array([[s, *window.at(s)] for s in range(0, 1000, 111)])}, f"window/{name}/")
    ramp = Ramp((0, 2.0, 0.5, 40))
    m.add({"rows": np.array([[s, ramp(s)] for s in (0, 13, 40, 90)])}, "ramp/down/")
    cases |= {"window": {"specs": specs}, "ramp": {"specs": {"down": [0, 2.0, 0.5, 40]}}}
    return {"latent_scale": SCALE, "cases": cases}


WRITTEN: dict[str, Callable[[Maker], dict]] = {
    "cs_divergence": divergences,
    "dreamdpo": dreamdpo,
    "dreamreward": dreamreward,
    "gpteval3d_elo": ratings,
    "marching_tets": tetrahedra,
    "meshmae": meshmae,
    "mvdream_recon": reconstructions,
    "preprocess": preprocessed,
    "rewardsds": rewardsds,
    "schedules": schedules,
    "sds_threestudio": threestudio,
}
