"""Losses, statistics and per-parameter gradients of the four phases against the original implementation."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.compat.absent import some
from tests.compat.reference import ROOT, Draws, arrays, crc_random, discover, load_case, of_set
from training.gan_phases import Batch, GanConfig, GanPhases

INPUTS = ("real_c", "gen_z", "gen_c")
# EG3D's names of settings that have other names here
NAMES = {"r1_gamma": "gamma"}
NAMES |= {f"neural_rendering_resolution_{k}": f"nrr_{k}" for k in ("initial", "final", "fade_kimg")}
pytestmark = pytest.mark.usefixtures("fixtures_dir")


def loss_phases() -> list[tuple[str, str, str]]:
    """List (network, case, phase) of every phase that a set has."""
    found = []
    for name in discover("*"):
        about = json.loads((ROOT / "eg3d" / f"{name}.json").read_text())
        for case, settings in about.get("losses", {}).items() if "config" in about else ():
            found += [(name, case, phase) for phase in settings["phases"]]
    return found


def gan_config(case: dict, rendering_kwargs: dict) -> GanConfig:
    """Translate EG3D's settings to ours; skip the test where a case has settings that our phases lack."""
    kwargs = {NAMES.get(key, key): value for key, value in case["loss_kwargs"].items() if key != "class_name"}
    kwargs |= {key: rendering_kwargs[key] for key in ("density_reg", "density_reg_p_dist", "reg_type")}
    if kwargs.get("gpc_reg_prob", 0.5) is None:
        kwargs |= {"gpc_reg_prob": 0.5, "gen_pose_cond": False}
    foreign = kwargs.keys() - {field.name for field in dataclasses.fields(GanConfig)}
    if foreign:
        pytest.skip(f"our phases have no {', '.join(sorted(foreign))}")
    return GanConfig(**kwargs)


def batch_of(case: dict, inputs, resolution: int) -> Batch:
    n = case["batch"]
    real = np.random.RandomState(case.get("real_seed", 654)).randint(0, 256, (n, 3, resolution, resolution))
    tensors = [torch.as_tensor(value) for value in inputs]
    return Batch(torch.as_tensor(real.astype(np.float32)) / 127.5 - 1, *tensors, case["cur_nimg"])


def run_phase(G, D, case: dict, phase: str, batch: Batch) -> tuple[dict[str, np.ndarray], list]:
    """Accumulate a phase's gradients; return its statistics and the log of its random draws."""
    G.train().requires_grad_(phase[0] == "G")
    D.train().requires_grad_(phase[0] == "D")
    spec = case["phases"][phase]
    phases = GanPhases(G, D, gan_config(case, G.rendering_kwargs))
    stats: dict[str, np.ndarray] = {}
    with Draws(spec["draw_base"]).injected() as draws:
        for loss in getattr(phases, f"{phase[0].lower()}_{phase[1:]}")(batch):
            (loss.value.mean() * spec["gain"]).backward()
            stats.update({k: v.detach().double().numpy().ravel() for k, v in loss.stats.items()})
    return stats, draws.log


@pytest.mark.parametrize(
    ("name", "loss_case", "phase"),
    some(loss_phases(), "this set has no eg3d/small_*.json with losses", width=3),
)
def test_phase(name, loss_case, phase):
    ref = arrays(ROOT / "eg3d" / f"{name}_losses.npz")
    inputs = of_set(ref, *(f"{loss_case}/in_{key}" for key in INPUTS))
    meta, G, D = load_case(name)
    case = meta["losses"][loss_case]
    spec = case["phases"][phase]
    stats, drawn = run_phase(G, D, case, phase, batch_of(case, inputs, G.img_resolution))
    if "draws" in spec:
        assert drawn == [d[:2] for d in spec["draws"]]
    prefix = f"{loss_case}/{phase}"
    for key in (key for key in ref if key.startswith(f"{prefix}/stat/")):
        stat = key.removeprefix(f"{prefix}/stat/")
        expected = ref[key]
        got = stats[stat]
        got = got.mean(keepdims=True) if expected.shape == (1,) else got
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected), stat
    average = f"{loss_case}/w_avg_after_{phase}"
    if average in ref:
        w_avg = G.backbone.mapping.w_avg.numpy()
        assert np.linalg.norm(w_avg - ref[average]) <= 1e-5 * np.linalg.norm(ref[average])
    compare_gradients(G if phase[0] == "G" else D, ref, prefix)


def gradient_row(name: str, gradient: np.ndarray) -> tuple[float, float, float]:
    """Compute the L2 norm, a random projection and the peak of a parameter's gradient."""
    direction = crc_random(f"proj:{name}", gradient.shape).astype(np.float32)
    return float(np.linalg.norm(gradient)), float((gradient * direction).sum()), float(np.abs(gradient).max())


def compare_gradients(module: torch.nn.Module, ref, prefix: str) -> None:
    """Compare each gradient by three numbers, relative to its norm (and 2e-6 of the largest norm).

    A noise strength is one number whose gradient sums a whole feature map times random noise; most of the sum
    cancels, in the float32 reference as here. Its error is therefore taken relative to the gradient of the
    same layer's weight, its projection also to the factor, and 2e-3 of it is allowed: b32.conv0 of small_a,
    Greg, is 9.280e-3 in our float64, 4.4e-5 off in the reference, 6e-6 in our float32. R1 is a second-order
    gradient. A bias has one only through the deviation over the batch, some hundredth of its weight's, and
    signs of rounding decide at which units: b16.conv0.bias of small_a is 1.7e-3 off on one processor and
    3.5e-3 on another, 2e-5 and 4e-5 of its weight's gradient, the float32 reference 1.4e-3. A tenth of that
    weight's gradient is therefore added to the scale of a bias of Dreg.
    """
    parameters = dict(module.named_parameters())
    keys = [k for k in ref if k.startswith(f"{prefix}/grad/") and "/none/" not in k]
    if not keys:
        pytest.skip(f"this set has no {prefix}/grad/...; statistics agree")
    largest = max(ref[k][0] for k in keys)
    for key in keys:
        name = key.removeprefix(f"{prefix}/grad/")
        gradient = parameters[name].grad.double().numpy()
        norm, projection, peak = ref[key]
        got_norm, got_projection, got_peak = gradient_row(name, gradient)
        # the bias of a density, in a difference of densities, is rounding alone
        scale = norm + 2e-6 * largest
        weight = key.replace("noise_strength", "weight")
        if name.endswith("noise_strength") and weight in ref:
            scale = 2 * (scale + ref[weight][0])
        weight = key.replace(".bias", ".weight")
        if prefix.endswith("Dreg") and name.endswith(".bias") and weight in ref:
            scale += 0.1 * ref[weight][0]
        assert abs(got_norm - norm) <= 1e-3 * scale, f"{name}: norm"
        limit = 1e-3
        if gradient.ndim == 0:
            limit *= max(1.0, abs(float(crc_random(f"proj:{name}", ()))))
        assert abs(got_projection - projection) <= limit * scale, f"{name}: projection"
        assert abs(got_peak - peak) <= 1e-3 * scale, f"{name}: peak"
    for key in (k for k in ref if k.startswith(f"{prefix}/grad/none/")):
        assert parameters[key.removeprefix(f"{prefix}/grad/none/")].grad is None
