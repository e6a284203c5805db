"""Presets: which row applies, what a network file decides, what a released checkpoint resolves to."""

import copy
import json
import re

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.evaluation.controlled_study.plan import TUNING_FLAGS
from eg3d_rlhf.modes.gan import resolve
from eg3d_rlhf.tuning.gan.presets import BUNDLED_STUDY, HEADS
from eg3d_rlhf.tuning.gan.reward_run import open_networks
from eg3d_rlhf.tuning.gan.settings import Settings
from tests import tiny_runs
from tests.generators.pickles.writer import SnapshotWriter, stock_networks
from tests.rejections import rejected


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


def test_a_released_checkpoint_needs_no_further_flags(released, repo):
    """Every value is the one that docs/reference/settings.md lists."""
    found = resolved("--cfg=ffhq", "--data=faces.zip", f"--init={released}", "--reward=sigma")
    assert found == resolved(
        "--cfg=ffhq", "--data=faces.zip", f"--init={released}", "--reward=sigma", "--lambda-r=10"
    )
    page = (repo / "docs" / "reference" / "settings.md").read_text().split("## A released checkpoint")[1]
    listed = {name: value.strip() for name, value in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.M)}
    shown = {
        name: "" if value is None else f"{value:g}" if type(value) in (int, float) else str(value)
        for name, value in found.items()
    }
    assert {**shown, "init": "X.pkl"} == listed and shown["init"].endswith("X.pkl")


def test_fine_tuning_without_a_reward_takes_eg3ds_row(released):
    found = resolved("--cfg=afhq", "--data=cats.zip", f"--init={released}")
    expected = {
        "task": "tuning",
        "gamma": 5.0,
        "batch": 32,
        "kimg": 2500.0,
        "aug": "ada",
        "blur_fade_kimg": 0.0,
        "gpc_reg_fade_kimg": 0.0,
    }
    assert (
        {name: found[name] for name in expected} == expected
        and found["nrr_initial"] == 128
        and found["gen_pose_cond"] is True
    )


def test_flags_win_over_the_network_and_the_preset(released):
    flags = (
        "--nrr-initial=32",
        "--gamma=3",
        "--mbstd-group=2",
        "--blur-fade-kimg=50",
        "--kimg=7",
        "--gen-pose-cond=False",
    )
    found = resolved("--cfg=ffhq", "--data=x.zip", f"--init={released}", *flags)
    assert (
        found["nrr_initial"],
        found["gamma"],
        found["mbstd_group"],
        found["kimg"],
        found["gen_pose_cond"],
    ) == (32, 3.0, 2, 7.0, False)
    assert found["blur_fade_kimg"] == 50.0  # as EG3D scales it: times batch/32


def test_what_depends_on_the_task_and_is_no_flag(tiny_networks):
    scratch, tuning = (resolve({"init": init}).gan for init in ("scratch", str(tiny_networks)))
    assert (scratch.ema_rampup, scratch.ada_kimg) == (0.05, 500.0) and (
        tuning.ema_rampup,
        tuning.ada_kimg,
    ) == (None, 100.0)


def test_the_main_run_is_written_out():
    """`HEADS` holds every number of `python train.py --reward=sigma --lambda-r=10`, and no other."""
    settings = resolve({"reward": "sigma", "lambda_r": 10.0})
    # by flags and files
    ruled = {
        "task",
        "cfg",
        "init",
        "reward",
        "preset",
        "reward_ckpt",
        "heldout_reward",
        "seed",
        "desc",
        "device",
        "no_summary",
        "strict_cameras",
    }
    values = {**settings.to_dict(), "ema_rampup": settings.gan.ema_rampup, "ada_kimg": settings.gan.ada_kimg}
    assert {name: value for name, value in values.items() if name not in ruled} == HEADS


def test_the_recipe_of_the_bundled_study_for_another_checkpoint(released):
    """Length, optimisers and reward phase are those of the study; the rest stays that of --cfg and --init."""
    flags = ("--cfg=ffhq", "--data=faces.zip", f"--init={released}", "--reward=sigma")
    study = resolved(*TUNING_FLAGS)
    paper = resolved(*flags)
    found = resolved(*flags, "--preset=bundled-study")
    differing = {name for name in paper if paper[name] != found[name]}
    shown = set(BUNDLED_STUDY) - {"ema_rampup"}  # follows from the task and is in no record
    assert {name: found[name] for name in shown} == {name: study[name] for name in shown}
    assert differing <= {*shown, "preset"} and {"reward_clip", "lambda_sigma", "rlr", "kimg"} <= differing
    assert (found["gamma"], found["nrr_initial"], found["gen_pose_cond"]) == (20.0, 128, True)
    assert resolve({"reward": "sigma", "preset": "bundled-study"}).changed(preset=None) == resolve(
        {"reward": "sigma"}
    )


def test_flags_win_over_the_recipe(released):
    flags = ("--cfg=ffhq", "--data=x.zip", f"--init={released}", "--reward=sigma", "--preset=bundled-study")
    found = resolved(*flags, "--lambda-sigma=2", "--kimg=3", "--set", "rlr=0.01")
    assert (found["lambda_sigma"], found["kimg"], found["rlr"]) == (2.0, 3.0, 0.01)
    # without its term, the weight per sample falls away, as in the main run
    assert resolved(*flags, "--lambda-sigma=0")["consistency_gate"] == 1.0


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--preset=bundled-study"], ("--preset", "--reward")),
        (["--preset=bundled-study", "--reward=solid"], ("--preset", "--reward=solid")),
    ],
)
def test_runs_that_the_recipe_does_not_suit(flags, names):
    rejected(CliRunner().invoke(train.main, ["-n", *flags]), *names)


def test_the_page_of_recipes_lists_the_values(repo):
    page = (repo / "docs" / "understand" / "recipes.md").read_text()
    for value in (BUNDLED_STUDY["reward_clip"], BUNDLED_STUDY["reward_shaping"], f"{BUNDLED_STUDY['rlr']:g}"):
        assert value in page
    row = next(line for line in page.splitlines() if "--lambda-sigma" in line)
    assert row.rstrip(" |").endswith(f"{BUNDLED_STUDY['lambda_sigma']:g}")


@pytest.mark.parametrize("flags", [{"lambda_sigma": 0.0}, {"reward_clip": "none"}])
def test_the_main_runs_gate_falls_away_with_its_anchor_or_clip(flags):
    assert resolve({"reward": "sigma"}).reward.terms.consistency_gate < 1
    assert resolve({"reward": "sigma", **flags}).reward.terms.consistency_gate == 1
    with pytest.raises(ValueError, match="--consistency-gate"):
        resolve({"reward": "sigma", **flags, "consistency_gate": 0.2})


def test_minibatch_std_groups_of_a_loaded_network_are_the_runs(tiny_networks, tmp_path):
    nets = open_networks(resolve({"init": str(tiny_networks), "mbstd_group": 2}), tiny_runs.RESOLUTION)
    assert nets.D.b4.mbstd.group_size == 2
    tiny_runs.networks.save(tmp_path / "saved.safetensors", nets)
    assert tiny_runs.networks.load(tmp_path / "saved.safetensors").D.b4.mbstd.group_size == 2
    assert resolve({"init": str(tmp_path / "saved.safetensors")}).net.mbstd_group == 2
    own = open_networks(resolve({"init": str(tiny_networks)}), tiny_runs.RESOLUTION)
    assert own.D.b4.mbstd.group_size == 4


def test_records_are_read_as_they_were_written(tiny_networks):
    for settings in (
        resolve({}),
        resolve({"init": str(tiny_networks), "amp": "bf16"}),
        resolve({"reward": "sigma", "lambda_r": 3.0}),
    ):
        record = json.loads(json.dumps(settings.to_dict()))
        assert Settings.from_values(record) == settings and Settings.from_values(record).to_dict() == record
