"""Test train.py --mode=circular-dpo from the command line: flags, rejected flags, and complete runs on a tiny
problem.
"""

import dataclasses
import json

import pytest
from click.testing import CliRunner

import train
from eg3d_rlhf.experiments.mode import Flags
from eg3d_rlhf.experiments.table import with_interval
from eg3d_rlhf.models.lora import adapted_layers
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.modes import circular_dpo as commands
from eg3d_rlhf.modes.circular_dpo import default_settings, resolve
from eg3d_rlhf.modes.flow_flags import circular_settings
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.families import opening
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.training.circular.settings import CircularRun, CircularSettings
from tests.rejections import raising, rejected
from tests.tuning.flow.tiny_problem import SETTINGS, tiny_problem
from training.config import from_dict


def run(*flags: str):
    return CliRunner().invoke(train.main, ["--mode=circular-dpo", *(str(f) for f in flags)])


def values(*flags: str) -> Flags:
    """Return the flags as the command receives them."""
    return Flags(commands.CIRCULAR_DPO.command.make_context("train", list(flags)).params)


def test_flags_of_the_other_mode_are_rejected_by_name():
    rejected(run("--kimg=1"), "--kimg", "--mode=gan")
    rejected(run("--lambda_r=1"), "--lambda-r", "--mode=gan")
    rejected(CliRunner().invoke(train.main, ["--loop-beta=3"]), "--loop-beta", "--mode=circular-dpo")
    of_gan = CliRunner().invoke(train.main, ["--mode", "gan", "--ablate=a"])
    rejected(of_gan, "--ablate", "--mode=circular-dpo")
    for unknown in (run("--nonsense"), CliRunner().invoke(train.main, ["--nonsense"])):
        assert unknown.exit_code == 2 and "--nonsense" in unknown.stderr  # of click, with its usage
    rejected(CliRunner().invoke(train.main, ["--mode=diffusion"]), "--mode", "circular-dpo", "'diffusion'")


def test_the_gan_mode_is_the_default_and_keeps_its_settings():
    plain, named = (CliRunner().invoke(train.main, [*flags, "-n"]) for flags in ([], ["--mode=gan"]))
    assert plain.exit_code == 0 and plain.stdout == named.stdout and "mode" not in json.loads(plain.stdout)
    assert run("-n").stdout == CliRunner().invoke(train.main, ["--mode", "circular_dpo", "-n"]).stdout


MISTAKES = {
    "seeds": (["--seeds=0,1"], ("--seeds", "--ablate")),
    "noises": (["--table-noises=4", "--set=no_summary=true"], ("--table-noises", "no_summary")),
    "summary": (["--ablate=a", "--set=no_summary=true"], ("no_summary", "--ablate")),
    "loop of one stage": (["--stage=structure", "--rounds=2"], ("--rounds", "--stage")),
    "both": (["--stage=structure", "--ablate=a..i"], ("--stage", "--ablate")),
    "control": (["--ablate=a", "--no-control"], ("--no-control", "--ablate")),
    "groups decide": (["--ablate=a", "--rounds=2"], ("--rounds", "--ablate")),
    "adapter of none": (["--tune=full", "--lora-rank=4"], ("--lora-rank", "--tune=lora")),
    "no regulariser": (
        ["--ablate=a,regulariser", "--set=loop_sft_weight=0"],
        ("--ablate=regulariser", "loop_sft_weight=0"),
    ),
    "sft": (["--loss=sft", "--set=loser_weight=0.5"], ("loser_weight", "sft", "0.5")),
    "toy": (
        ["--set=dtype=float16", "--set=voxel_share=0.5"],
        ("--set voxel_share", "--dtype", "--pipeline"),
    ),
    "trellis": (["--pipeline=somewhere"], ("--pairs", "--pipeline", "missing")),
    "toy's pairs": (["--pairs={tmp}"], ("--pairs", "--pipeline")),
    "stage": (["--stage=mesh"], ("stage", "structure", "voxels", "'mesh'")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_flags(case, tmp_path):
    flags, names = MISTAKES[case]
    result = run(*(flag.format(tmp=tmp_path) for flag in flags), f"--outdir={tmp_path / 'runs'}")
    rejected(result, *names)
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_settings_and_touches_nothing(tmp_path):
    result = run("-n", "--ablate=a,d", "--seeds=5,6", "--seed=5", f"--outdir={tmp_path / 'runs'}")
    found = json.loads(result.stdout)
    assert (
        found["groups"] == ["a", "d", "i"]
        and found["training_seeds"] == [5, 6]
        and "5/pairs" in found["tasks"]
    )
    assert found["artefacts"] == str(tmp_path / "runs" / "artefacts") and not (tmp_path / "runs").exists()


def test_flags_reach_their_settings():
    defaults = default_settings("toy")
    own = circular_settings(
        values(
            "--beta=200", "--lr=0.5", "--steps=7", "--loss=sigmoid", "--set=schedule=cosine", "--batch-gpu=1"
        ),
        defaults,
    )
    assert (own.human.dpo.beta, own.human.dpo.kind, own.human.lr, own.human.steps, own.human.schedule) == (
        200,
        "sigmoid",
        0.5,
        7,
        "cosine",
    )
    ratio = defaults.loop.dpo.beta / defaults.human.dpo.beta
    assert (
        own.loop.dpo.beta == pytest.approx(ratio * 200)
        and own.loop.dpo.loser_weight == defaults.loop.dpo.loser_weight
    )
    assert (own.loop.lr, own.loop.steps, own.sft.lr, own.sft.dpo.kind) == (0.5, 7, 0.5, "sft")
    of_loop = ("loop_lr=2", "loop_steps=3", "loop_beta=9", "loop_loser_weight=1", "loop_sft_weight=0")
    own = circular_settings(values(*(f"--set={one}" for one in of_loop)), defaults)
    assert (
        own.loop.lr,
        own.loop.steps,
        own.loop.dpo.beta,
        own.loop.dpo.loser_weight,
        own.loop.dpo.sft_weight,
    ) == (2, 3, 9, 1, 0)
    assert own.human == defaults.human
    own = circular_settings(
        values("--set=roles=reward", "--set=choose_noises=0", "--set=loop_pairs=3", "--rounds=2"), defaults
    )
    assert (own.weighing.roles, own.choosing, own.rounds) == ("reward", None, 2)
    assert own.loop_pairs.per_pair == 3
    own = circular_settings(values("--tune=full"), defaults)
    assert own.human.lora is None and own.loop.lora is None
    own = circular_settings(
        values("--tune=lora", "--lora-rank=3", "--set=lora_targets=to_q, to_out"), defaults
    )
    assert own.human.lora.rank == 3 and own.loop.lora.targets == ("to_q", "to_out")
    assert circular_settings(values("--loss=sft"), defaults).loop.dpo.needs_reference
    assert circular_settings(values(), defaults) == defaults


def test_settings_survive_json():
    run_ = resolve(values("--ablate=a..i"))
    assert from_dict(CircularRun, json.loads(json.dumps(dataclasses.asdict(run_)))) == run_
    source = ProblemSource(pipeline="x", pairs="y", views=3)
    trellis = CircularRun(circular=CircularSettings(), source=source)
    assert from_dict(CircularRun, json.loads(json.dumps(dataclasses.asdict(trellis)))) == trellis
    with raising("speed"):
        from_dict(CircularRun, {"speed": 3})


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Make the command use the tiny problem."""
    monkeypatch.setattr(opening, "open_problem", lambda source, device: tiny_problem())
    monkeypatch.setattr(commands, "default_settings", lambda pipeline: SETTINGS)

    def go(*flags: str):
        result = run(*flags, *([] if any("--resume" in f for f in flags) else [f"--outdir={tmp_path}"]))
        assert result.exit_code == 0, (result.stderr, result.exception)
        return result

    return go


def artefacts_of(folder):
    return sorted(path for path in (folder / "artefacts").rglob("*") if path.is_file())


def test_a_run_writes_weights_steps_and_options(tiny, tmp_path):
    result = tiny()
    folder = tmp_path / "00000-circular-dpo-toy-loop"
    found = json.loads((folder / "result.json").read_text())
    assert [step["step"] for step in found["steps"]] == ["people", "pairs", "loop"]
    assert found["weights"] == {"voxels": "voxels", "structure": "structure"}
    assert (folder / "voxels" / "adapter_model.safetensors").exists() and (
        folder / "structure" / "policy.json"
    ).exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["groups"]) == {"a", "d", "i", "control"} and "a_vs_d" in summary["pairwise"]
    # the control has trained the same steps on other labels
    assert [step["step"] for step in found["control_steps"]] == ["people", "pairs", "loop"]
    assert "a_vs_control" in summary["pairwise"]
    names = ("voxels/adapter_model.safetensors", "control/voxels/adapter_model.safetensors")
    tuned, control = ((folder / name).read_bytes() for name in names)
    assert tuned != control
    rated = with_interval(summary["pairwise"]["a_vs_d"])
    rows = [line for line in result.stdout.splitlines() if "(a)" in line and "(d)" in line]
    assert any(rated in line for line in rows) and "win_rate" in result.stdout
    written = {path: path.stat().st_mtime_ns for path in artefacts_of(tmp_path)}
    again = tiny(f"--resume={folder}")
    assert "win_rate" not in again.stdout  # no step of a training
    assert {path: path.stat().st_mtime_ns for path in artefacts_of(tmp_path)} == written
    assert json.loads((folder / "result.json").read_text()) == found


def test_one_stage(tiny, tmp_path):
    tiny("--stage=structure", "--set=desc=x")
    found = json.loads((tmp_path / "00000-circular-dpo-toy-stage-structure-x" / "result.json").read_text())
    assert found["weights"] == {"structure": "structure"} and len(found["steps"]) == 1
    summary = json.loads((tmp_path / "00000-circular-dpo-toy-stage-structure-x" / "summary.json").read_text())
    assert set(summary["groups"]) == {"c", "i", "control"}


def test_without_a_control_the_table_says_so(tiny, tmp_path):
    remark = "nothing here tests"
    with_control, without_control = (
        tiny("--stage=structure", *flags).stdout for flags in ((), ("--no-control",))
    )
    assert remark not in with_control and remark in without_control
    first, second = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/summary.json")))
    assert set(first["groups"]) == {"c", "i", "control"} and set(second["groups"]) == {"c", "i"}
    # the control does not change the run
    assert first["groups"]["c"]["win_rate"] == second["groups"]["c"]["win_rate"]
    assert not any(tmp_path.glob("*1-*/control"))


def test_two_rounds_leave_the_whole_network(tiny, tmp_path):
    tiny("--rounds=2", "--set=no_summary=true")
    folder = tmp_path / "00000-circular-dpo-toy-loop"
    assert len(json.loads((folder / "result.json").read_text())["steps"]) == 6
    model = tuned_model(tiny_problem().pipeline.stages[1].model, folder / "voxels")
    assert not adapted_layers(model) and (folder / "voxels" / "model.safetensors").exists()


def test_an_ablation_writes_its_table(tiny, tmp_path):
    result = tiny("--ablate=a,d", "--seeds=0,1", "--table-noises=2", "--jobs=1")
    folder = tmp_path / "00000-circular-dpo-toy-ablation-adi"
    found = json.loads((folder / "ablation.json").read_text())
    assert set(found["groups"]) == {"a", "d", "i"} and set(found["pairwise"]) == {
        "a_vs_d",
        "a_vs_i",
        "d_vs_i",
    }
    assert found["training_seeds"] == [0, 1] and found["problem"] == {"problem": "tiny", "stages": 2}
    assert sum(line.startswith("| (a) |") for line in result.stdout.splitlines()) == 1
    assert (folder / "ablation.png").exists()


def test_a_run_and_its_ablation_share_artefacts(tiny, tmp_path):
    tiny("--set=no_summary=true")
    assert not (tmp_path / "00000-circular-dpo-toy-loop" / "summary.json").exists()
    before = {path.name for path in (tmp_path / "artefacts").iterdir()}
    tiny("--ablate=a", "--seeds=0", "--table-noises=2", "--jobs=1")
    assert {
        path.name.split("-")[0] for path in (tmp_path / "artefacts").iterdir() if path.name not in before
    } == {"scores"}


def test_resume_refuses_other_inputs_and_other_modes(tiny, tmp_path, monkeypatch):
    tiny()
    folder = tmp_path / "00000-circular-dpo-toy-loop"
    monkeypatch.setattr(
        opening, "open_problem", lambda source, device: tiny_problem(identity={"problem": "else"})
    )
    rejected(run(f"--resume={folder}"), str(folder), "problem.problem", "else", "tiny")
    rejected(run("--mode=gan", f"--resume={folder}"), "--resume", "--mode=circular-dpo")
    options = folder / "training_options.json"
    options.write_text(json.dumps({"cfg": "heads64"}))
    with raising("--resume", "--mode=gan"):
        commands.CIRCULAR_DPO.read(folder)
    options.write_text("{")
    with raising("training_options.json", "JSON"):
        commands.CIRCULAR_DPO.read(folder)


def test_the_toy_opens_as_a_problem():
    problem = open_problem(ProblemSource())
    assert [stage.name for stage in problem.pipeline.stages] == ["structure", "voxels"]
    assert problem.train_pairs["voxels"] is problem.train_pairs["voxels"] and problem.parts is not None
