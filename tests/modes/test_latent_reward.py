"""eg3d-rlhf reward latent: the table, the file, and that the online mode takes it for its own stage alone."""

from dataclasses import replace

from click.testing import CliRunner

from eg3d_rlhf.modes.jobs import main
from eg3d_rlhf.tuning.flow.families import opening
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.training import latent_reward as networks
from eg3d_rlhf.tuning.flow.training.latent_reward import LatentReward
from eg3d_rlhf.tuning.flow.training.online.online_arms import reward_of
from tests.rejections import raising, rejected
from training.storage import read_tensors


def test_a_reward_is_written_beside_the_decoded_one(tmp_path, monkeypatch):
    problem = toy_problem(pairs_per_condition=1)
    problem = replace(problem, held_out_prompts=problem.held_out_prompts[:8])
    monkeypatch.setattr(networks, "MEMBERS", 2)
    monkeypatch.setattr(opening, "open_problem", lambda source, device: problem)
    path = tmp_path / "latent.safetensors"
    result = CliRunner().invoke(main, ["reward", "latent", f"--out={path}", "--seeds=0,1"])
    assert result.exit_code == 0, result.output
    assert "| latent |" in result.stdout and "| decoded |" in result.stdout and "8 pairs" in result.stdout
    evaluation = read_tensors(path, "latent-reward")[1]["record"]["evaluation"]
    assert evaluation["latent"]["samples_per_second"] > 0 and len(evaluation["decoded"]["by_seed"]) == 2
    structure, voxels = problem.pipeline.stages
    assert isinstance(reward_of(str(path), problem, voxels), LatentReward)
    with raising(str(path), "'structure'", "'voxels'"):
        reward_of(str(path), problem, structure)


def test_a_name_that_is_no_reward():
    result = CliRunner().invoke(main, ["reward", "latent", "--out=x.pt"])
    rejected(result, "--out", ".safetensors", "x.pt")
