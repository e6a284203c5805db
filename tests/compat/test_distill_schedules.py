"""Tables, forward process, DDIM and time windows against diffusers, MVDream and threestudio (F1 and the integers of F2)."""

import pytest
import torch

from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule, Ramp, TimeWindow, betas_of, ddim_times
from tests.compat.distill_reference import StandIn, close, needs, recipe, under, values

pytestmark = needs("schedules")
F1 = 2e-6


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule()


def test_tables(schedule):
    v = values("schedules")
    close(betas_of(), v["sd/betas"], F1)
    close(schedule.alphas_cumprod, v["sd/alphas_cumprod"], F1)
    close(schedule.alphas_cumprod, v["mvdream/alphas_cumprod"], F1)
    close(schedule.alpha(torch.tensor([-1]), torch.zeros(1, 1)).squeeze(), v["sd/final_alpha_cumprod"], F1)
    kinds = {"ddpm_linear": {"kind": "linear", "start": 1e-4, "end": 0.02}, "ddpm_cosine": {"kind": "squaredcos_cap_v2"}}
    for name, options in {**kinds, "zero_snr": {"zero_snr": True}}.items():
        close((1 - betas_of(**options)).cumprod(0), v[f"{name}/alphas_cumprod"], F1)


@pytest.mark.parametrize("case", sorted(key for key in values("schedules") if key.startswith("timesteps/")))
def test_times_of_ddim(case):
    spacing, n = case.split("/")[1].split("_")
    assert ddim_times(int(n), spacing) == values("schedules")[case].tolist()


def test_forward_and_back(schedule):
    v = values("schedules")
    x, noise, t = v["forward/x0"], v["forward/noise"], v["forward/t"]
    close(schedule.mix(x, noise, t), v["forward/x_t"], F1)
    close(schedule.velocity(x, noise, t), v["forward/velocity"], F1)
    close(schedule.noise_of_velocity(v["forward/x_t"], v["forward/velocity"], t), noise, F1)
    close(schedule.mix(x, noise, t), v["mvdream_forward/x_t"], F1)
    close(schedule.x0(v["mvdream_forward/x_t"], v["mvdream_forward/pred"], t), v["mvdream_forward/x0_from_noise"], F1)


@pytest.mark.parametrize("case", sorted({key.rsplit("/", 1)[0] for key in values("schedules") if key.startswith("ddim_step/")}))
def test_ddim_steps(schedule, case):
    v, (kind, n) = under("schedules", case), case.split("/")[1].rsplit("_", 1)
    noise_of = {"epsilon": lambda x, e, _t: e, "v_prediction": schedule.noise_of_velocity, "sample": schedule.noise_of_x0}[kind]
    noise = noise_of(v["sample"], v["model_output"], v["t"])
    close(schedule.ddim_step(v["sample"], noise, v["t"], v["t"] - 1000 // int(n)), v["prev_sample"], F1)
    close(schedule.x0(v["sample"], noise, v["t"]), v["pred_original_sample"], F1)


@pytest.mark.parametrize("case", sorted({key.rsplit("/", 1)[0] for key in values("schedules") if key.startswith("ddim_chain/")}))
def test_ddim_chains(schedule, case):
    v, n = under("schedules", case), int(case.split("/")[1])
    net = StandIn({k: a for k, a in v.items() if k.startswith("net_")}, schedule.alphas_cumprod, {})

    def predict(x, t):
        null, text = (net.predict_noise(x, t, v[kind]) for kind in ("null", "cond"))
        return null + v["scale"] * (text - null)

    times = [torch.tensor([time]) for time in [*ddim_times(n), ddim_times(n)[-1] - 1000 // n]]
    close(schedule.ddim_chain(v["x_start"], times, predict), v["x_end"], F1)


@needs("sds_threestudio")
@pytest.mark.parametrize("case", sorted(recipe("sds_threestudio")["cases"].get("window", {}).get("specs", {})))
def test_time_windows(case):
    low, high, *annealed = recipe("sds_threestudio")["cases"]["window"]["specs"][case]
    low, high = (Ramp(tuple(end) if isinstance(end, list) else end) for end in (low, high))
    window = TimeWindow(low=low, high=high, sqrt_anneal=int(annealed[0].split()[-1]) if annealed else None)
    rows = values("sds_threestudio")[f"window/{case}/rows"].tolist()
    assert [[step, *window.at(step)] for step, *_ in rows] == rows


@needs("sds_threestudio")
@pytest.mark.parametrize(
    ("case", "ramp"),
    [("lambda_orient", Ramp((0, 10.0, 1000.0, 5000))), ("three", Ramp((1.0, 0.0, 100))), ("exp", Ramp((0, 1.0, 1e-3, 1000), log=True))],
)
def test_ramps(case, ramp):
    rows = values("sds_threestudio")[f"ramp/{case}/rows"]
    close(torch.tensor([ramp(int(step)) for step, _ in rows.tolist()], dtype=torch.float64), rows[:, 1], 1e-12)
