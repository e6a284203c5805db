"""Presets: which row applies, what a network file decides, what a released checkpoint resolves to."""

import copy
import json
import re

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.modes.gan import HEADS, PRESETS, resolve
from eg3d_rlhf.tuning.gan.run import open_networks
from eg3d_rlhf.tuning.gan.settings import REWARDED, SCRATCH, TUNING, Settings
from tests import tiny_runs
from tests.generators.pickles.writer import SnapshotWriter, stock_networks

RELEASED = {  # `--cfg=ffhq --data=faces.zip --init=X.pkl --reward=sigma`: every resolved value
    "amp": "off", "anchor_resolution": 64, "aug": "noaug", "batch": 16, "batch_gpu": None, "blur_fade_kimg": 0.0, "c_scale": 1.0,
    "cbase": 32768, "cfg": "ffhq", "checkpoint_ticks": 1, "cmax": 512, "cond": True, "control": None, "d_num_fp16_res": 4,
    "data": "faces.zip", "decoder_lr_mul": 1.0, "field_colour": 4.0, "field_kimg": 0.0, "field_lr": 0.02, "field_soft": 0.4,
    "density_reg": 0.25, "density_reg_every": 4, "density_reg_p_dist": 0.004, "desc": None,
    "device": "auto", "disc_c_noise": 0.0, "dlr": 0.002, "early_stop": None,
    "early_stop_distance": None, "ema_kimg": 5.0, "freezed": 0, "g_num_fp16_res": 0, "gamma": 20.0,
    "gen_pose_cond": True, "glr": 0.0025, "gpc_reg_fade_kimg": 0.0, "gpc_reg_prob": 0.5, "init": "X.pkl", "kimg": 20.0,
    "lambda_front": 0.0, "lambda_nose": 0.0, "nose_floor": "window",
    "lambda_r": 10.0, "lambda_sigma": 0.01, "map_depth": 2, "mbstd_group": 4, "mirror": False, "no_summary": False,
    "nrr_fade_kimg": 1000.0, "nrr_final": None, "nrr_initial": 128, "p": 0.2, "plane_layout": "eg3d", "reg_type": "l1", "reward": "sigma",
    "picture_hold": 0.0, "picture_kimg": 0.0, "picture_lr": 0.005,
    "reference": None, "reward_ckpt": None, "reward_clip": "-10,10", "reward_shaping": "none", "reward_watch": None, "rlr": 0.0025,
    "round_aggregate": None, "round_doubtful": 0.5, "round_labels": "synthetic", "round_members": 5, "round_pairs": 400,
    "round_preset": None,
    "round_start": "pretrained", "rounds": 0, "seed": 0,
    "snap": 5, "sphere_init": 0.0, "sr_module": None, "sr_noise_mode": "none", "sr_num_fp16_res": 4, "start": "G",
    "style_mixing_prob": 0.0, "target": 0.6, "task": "reward", "tick": 1.0, "workers": None,
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small stand-in for ffhq512-128.pkl, in the format of EG3D's snapshots."""
    nets = copy.deepcopy(stock_networks())
    nets.G.neural_rendering_resolution = nets.G_ema.neural_rendering_resolution = 128
    path = tmp_path_factory.mktemp("released") / "X.pkl"
    path.write_bytes(SnapshotWriter().snapshot(nets))
    return path


def resolved(*flags) -> dict:
    result = CliRunner().invoke(train.main, ["-n", *map(str, flags)])
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    return json.loads(result.stdout)


def plain(settings: dict) -> dict:
    """Without the folder of this machine."""
    assert settings["init"].endswith("X.pkl")
    return {**settings, "init": "X.pkl"}


def test_a_released_checkpoint_needs_no_further_flags(released):
    assert plain(resolved("--cfg=ffhq", "--data=faces.zip", f"--init={released}", "--reward=sigma")) == RELEASED
    asked = resolved("--cfg=ffhq", "--data=faces.zip", f"--init={released}", "--reward=sigma", "--lambda-r=10")
    assert plain(asked) == RELEASED


def test_the_page_lists_the_same_values(repo):
    page = (repo / "docs" / "settings.md").read_text().split("## A released checkpoint")[1]
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.M))
    shown = {name: "" if value is None else f"{value:g}" if type(value) in (int, float) else str(value) for name, value in RELEASED.items()}
    assert {name: value.strip() for name, value in listed.items()} == shown


def test_fine_tuning_without_a_reward_takes_eg3ds_row(released):
    found = resolved("--cfg=afhq", "--data=cats.zip", f"--init={released}")
    expected = {"task": "tuning", "gamma": 5.0, "batch": 32, "kimg": 2500.0, "aug": "ada", "blur_fade_kimg": 0.0, "gpc_reg_fade_kimg": 0.0}
    assert {name: found[name] for name in expected} == expected and found["nrr_initial"] == 128 and found["gen_pose_cond"] is True


def test_flags_win_over_the_network_and_the_preset(released):
    flags = ("--nrr-initial=32", "--gamma=3", "--mbstd-group=2", "--blur-fade-kimg=50", "--kimg=7", "--gen-pose-cond=False")
    found = resolved("--cfg=ffhq", "--data=x.zip", f"--init={released}", *flags)
    assert (found["nrr_initial"], found["gamma"], found["mbstd_group"], found["kimg"], found["gen_pose_cond"]) == (32, 3.0, 2, 7.0, False)
    assert found["blur_fade_kimg"] == 50.0  # as EG3D scales it: times batch/32


def test_what_depends_on_the_task_and_is_no_flag(tiny_networks):
    scratch, tuning = (resolve({"init": init}).gan for init in ("scratch", str(tiny_networks)))
    assert (scratch.ema_rampup, scratch.ada_kimg) == (0.05, 500.0) and (tuning.ema_rampup, tuning.ada_kimg) == (None, 100.0)


def test_every_family_has_a_row_for_every_task():
    families = {"ffhq", "afhq", "shapenet", "heads64"}
    assert set(PRESETS) == {(family, task) for family in families for task in (SCRATCH, TUNING, REWARDED)}
    names = Settings(task=SCRATCH).to_dict().keys() | {"ema_rampup", "ada_kimg"}  # no knobs: the task alone decides them
    assert all(row.keys() <= names for row in PRESETS.values())


def test_the_main_run_is_written_out():
    """`HEADS` holds every number of `python train.py --reward=sigma --lambda-r=10`, and no other."""
    settings = resolve({"reward": "sigma", "lambda_r": 10.0})
    ruled = {"task", "cfg", "init", "reward", "reward_ckpt", "reward_watch", "seed", "desc", "device", "no_summary"}  # by flags and files
    values = {**settings.to_dict(), "ema_rampup": settings.gan.ema_rampup, "ada_kimg": settings.gan.ada_kimg}
    assert {name: value for name, value in values.items() if name not in ruled} == HEADS


def test_minibatch_std_groups_of_a_loaded_network_are_the_runs(tiny_networks, tmp_path):
    nets = open_networks(resolve({"init": str(tiny_networks), "mbstd_group": 2}), tiny_runs.RESOLUTION)
    assert nets.D.b4.mbstd.group_size == 2
    tiny_runs.networks.save(tmp_path / "saved.safetensors", nets)
    assert tiny_runs.networks.load(tmp_path / "saved.safetensors").D.b4.mbstd.group_size == 2
    assert resolve({"init": str(tmp_path / "saved.safetensors")}).net.mbstd_group == 2
    own = open_networks(resolve({"init": str(tiny_networks)}), tiny_runs.RESOLUTION)
    assert own.D.b4.mbstd.group_size == 4


def test_records_are_read_as_they_were_written(tiny_networks):
    for settings in (resolve({}), resolve({"init": str(tiny_networks), "amp": "bf16"}), resolve({"reward": "sigma", "lambda_r": 3.0})):
        record = json.loads(json.dumps(settings.to_dict()))
        assert Settings.of(record) == settings and Settings.of(record).to_dict() == record


def test_changed_settings_keep_the_others():
    settings = resolve({"kimg": 0.5})
    assert settings.changed(kimg=1.0).to_dict() == {**settings.to_dict(), "kimg": 1.0}
    with pytest.raises(ValueError, match="kimg must be > 0"):
        settings.changed(kimg=-1.0)


def test_a_run_folder_is_resolved_to_its_newest_network(tiny_networks, tmp_path):
    for name in ("network-snapshot-000001.safetensors", "network-snapshot-000002.safetensors"):
        (tmp_path / name).write_bytes(tiny_networks.read_bytes())
    assert resolve({"init": str(tmp_path)}).net.init == str(tmp_path / "network-snapshot-000002.safetensors")
