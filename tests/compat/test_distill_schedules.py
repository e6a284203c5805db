"""Tables, forward process, DDIM, cameras and time windows against diffusers, MVDream and threestudio
(F1 and the integers of F2).
"""

import json
import re

import pytest
import torch

from eg3d_rlhf.generators.assets.views import network_cameras, to_z_up, unit_distance, views_at
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, ddim_times, make_betas
from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS, Ramp, TimeWindow
from tests.compat.absent import some
from tests.compat.distill_reference import StandIn, close, members, needs, present, recipe, under, values

NAME = "schedules"
SDS = "sds_threestudio"
F1 = 2e-6
pytestmark = needs(NAME)
# as diffusers' schedulers call them; where the set's JSON has no configuration of them
OTHER_TABLES = {
    "mvdream": {},
    "zero_snr": {"zero_snr": True},
    "ddpm_linear": {"schedule_name": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "ddpm_cosine": {"schedule_name": "squaredcos_cap_v2"},
}


def betas(table: str = "sd") -> torch.Tensor:
    """Compute the betas of a table as the set configures it, Stable Diffusion's where none is named."""
    config = recipe(NAME)["cases"].get(table, {}).get("config")
    if config is None:
        return make_betas(**OTHER_TABLES.get(table, {}))
    names = {
        "beta_schedule": "schedule_name",
        "beta_start": "beta_start",
        "beta_end": "beta_end",
        "rescale_betas_zero_snr": "zero_snr",
    }
    return make_betas(**{ours: config[theirs] for theirs, ours in names.items() if theirs in config})


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule((1 - betas()).cumprod(0))


def test_stable_diffusions_table(schedule):
    wanted, bar, final = present(values(NAME), "sd/betas", "sd/alphas_cumprod", "sd/final_alpha_cumprod")
    close(betas(), wanted, F1)
    close(schedule.alphas_cumprod, bar, F1)
    close(schedule.alpha(torch.tensor([-1]), torch.zeros(1, 1)).squeeze(), final, F1)


TABLES = [name for name in members(NAME, "") if f"{name}/alphas_cumprod" in values(NAME) and name != "sd"]


@pytest.mark.parametrize("name", some(TABLES, f"this set has no table but sd in {NAME}.npz"))
def test_other_tables(name):
    (bar,) = present(values(NAME), f"{name}/alphas_cumprod")
    close((1 - betas(name)).cumprod(0), bar, F1)


def each_member(group: str):
    """Parametrize a test over the names right below a group of arrays."""
    found = some(members(NAME, group), f"this set has no {group}/... in {NAME}.npz")
    return pytest.mark.parametrize("case", found)


@each_member("timesteps")
def test_times_of_ddim(case):
    spacing, n = case.split("_")
    assert ddim_times(int(n), spacing) == values(NAME)[f"timesteps/{case}/timesteps"].tolist()


def test_forward_and_back(schedule):
    x, noise, t, x_t, velocity = present(under(NAME, "forward"), "x0", "noise", "t", "x_t", "velocity")
    close(schedule.mix(x, noise, t), x_t, F1)
    close(schedule.velocity(x, noise, t), velocity, F1)
    close(schedule.noise_of_velocity(x_t, velocity, t), noise, F1)


def test_mvdreams_forward_and_back(schedule):
    x, noise, t = present(under(NAME, "forward"), "x0", "noise", "t")
    x_t, pred, x0 = present(under(NAME, "mvdream_forward"), "x_t", "pred", "x0_from_noise")
    close(schedule.mix(x, noise, t), x_t, F1)
    close(schedule.x0(x_t, pred, t), x0, F1)


@each_member("ddim_step")
def test_ddim_steps(schedule, case):
    v = under(NAME, f"ddim_step/{case}")
    kind, n = case.rsplit("_", 1)
    noise_of = {
        "epsilon": lambda x, e, _t: e,
        "v_prediction": schedule.noise_of_velocity,
        "sample": schedule.noise_of_x0,
    }[kind]
    noise = noise_of(v["sample"], v["model_output"], v["t"])
    close(schedule.ddim_step(v["sample"], noise, v["t"], v["t"] - STEPS // int(n)), v["prev_sample"], F1)
    close(schedule.x0(v["sample"], noise, v["t"]), v["pred_original_sample"], F1)


@each_member("ddim_chain")
def test_ddim_chains(schedule, case):
    v = under(NAME, f"ddim_chain/{case}")
    n = int(case)
    net = StandIn({k: a for k, a in v.items() if k.startswith("net_")}, schedule.alphas_cumprod, {})

    def predict(x, t):
        null, text = (net.predict_noise(x, t, v[kind]) for kind in ("null", "cond"))
        return null + v["scale"] * (text - null)

    times = [torch.tensor([time]) for time in [*ddim_times(n), ddim_times(n)[-1] - STEPS // n]]
    close(schedule.ddim_chain(v["x_start"], times, predict), v["x_end"], F1)


@each_member("camera")
def test_our_front_is_the_networks_front(case):
    """nVIEWS_eELEVATION_aFIRST_sSPAN: MVDream's table counts azimuth from -y; the front, +x, is at its 90
    degrees.
    """
    (theirs,) = present(values(NAME), f"camera/{case}/blender")
    views, elevation, first, span = map(int, re.fullmatch(r"n(\d+)_e(-?\d+)_a(-?\d+)_s(\d+)", case).groups())
    azimuth = first + torch.arange(views, dtype=torch.float64) * span / views
    rest = [torch.full_like(azimuth, value) for value in (elevation, 1.0, 40.0)]
    same, turned = (views_at(angle, *rest).cameras[:, :16] for angle in (azimuth, azimuth - 90))
    same = same.reshape(-1, 4, 4)
    world = theirs.reshape(-1, 4, 4)
    torch.testing.assert_close(to_z_up(same), world, rtol=0, atol=2e-6)
    if f"camera/{case}/opengl" in values(NAME):  # their y-up matrix keeps OpenGL's camera axes
        y_up = values(NAME)[f"camera/{case}/opengl"].reshape(-1, 4, 4)
        torch.testing.assert_close(same * torch.tensor([1.0, -1.0, -1.0, 1.0]), y_up, rtol=0, atol=2e-6)
    before = turned.clone()
    torch.testing.assert_close(network_cameras(turned), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(turned, before)
    front = views_at(*(torch.tensor([value], dtype=torch.float64) for value in (0.0, 0.0, 2.7, 40.0))).cameras
    torch.testing.assert_close(
        network_cameras(front).view(4, 4)[:3, 3], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=1e-5
    )


def test_the_translation_gets_norm_one_and_the_argument_stays():
    given, wanted = present(under(NAME, "normalize_camera"), "camera", "out")
    kept = given.clone()
    torch.testing.assert_close(unit_distance(given), wanted, rtol=2e-6, atol=1e-6)
    assert torch.equal(given, kept)


def specs(kind: str) -> dict:
    return recipe(SDS)["cases"].get(kind, {}).get("specs", {})


def each_spec(kind: str):
    """Parametrize a test over the windows or ramps of the JSON."""
    return pytest.mark.parametrize(
        "case", some(specs(kind), f"this set has no specs of {kind} in {SDS}.json")
    )


@needs(SDS)
@each_spec("window")
def test_time_windows(case):
    low, high, *annealed = specs("window")[case]
    low, high = (Ramp(tuple(end) if isinstance(end, list) else end) for end in (low, high))
    window = TimeWindow(low=low, high=high, sqrt_anneal=int(annealed[0].split()[-1]) if annealed else None)
    rows = values(SDS)[f"window/{case}/rows"].tolist()
    assert [[step, *window.at(step)] for step, *_ in rows] == rows


@needs(SDS)
@each_spec("ramp")
def test_ramps(case):
    spec = specs("ramp")[case]  # numbers, or "[...] log-linear"
    numbers = json.loads(spec[: spec.index("]") + 1]) if isinstance(spec, str) else spec
    ramp = Ramp(tuple(numbers), log="log" in str(spec))
    rows = values(SDS)[f"ramp/{case}/rows"]
    close(
        torch.tensor([ramp(int(step)) for step, _ in rows.tolist()], dtype=torch.float64), rows[:, 1], 1e-12
    )
