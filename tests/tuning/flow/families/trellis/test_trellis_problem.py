"""TRELLIS as a problem: preference pairs, rewards fitted to them, and rejected files."""

import copy
import json
import shutil

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import read_pairs, write_pairs
from eg3d_rlhf.tuning.flow.base.ranking import Candidate, Imported, pair_up
from eg3d_rlhf.tuning.flow.base.sampling import scores, voxels_for
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION
from eg3d_rlhf.tuning.flow.families import trellis as family
from eg3d_rlhf.tuning.flow.families.learned_evaluators import LinearReward, features
from eg3d_rlhf.tuning.flow.families.opening import open_problem, open_stage
from eg3d_rlhf.tuning.flow.families.trellis_assets import SplatAsset
from eg3d_rlhf.tuning.flow.families.trellis_files import LATENT, STRUCTURE, read_pipeline
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import LoopPairMaker
from eg3d_rlhf.tuning.flow.training.circular.settings import LoopPairsConfig
from tests.rejections import raising
from tests.tuning.flow.families.trellis.tiny_trellis import NAMES, tokens, voxels, write_imported


def write_people(folder, file, stages=(STRUCTURE, LATENT), per_condition=3):
    """Write three ranked assets per prompt; better ones have a larger last channel."""
    assets = []
    for c, name in enumerate(NAMES):
        for rank in range(per_condition):
            generator = torch.Generator().manual_seed(10 * c + rank)
            feats = torch.randn(40, 4, generator=generator) - torch.tensor([0, 0, 0, 2.0 * rank])
            both = {
                STRUCTURE: torch.randn(2, 4, 4, 4, generator=generator),
                LATENT: SparseSample(voxels(10 * c + rank), feats),
            }
            assets.append(
                Candidate(name=str(rank), condition=name, rank=rank, latents={s: both[s] for s in stages})
            )
    write_imported(folder, Imported(pairs=pair_up(assets), conditioning=tokens()), file)
    return folder


def trellis_problem(root, pairs=None, **more):
    return family.FAMILY.open(
        ProblemSource(pipeline=str(root), pairs=None if pairs is None else str(pairs), **more), "cpu"
    )


@pytest.fixture(scope="session")
def people(trellis_root, tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("people") / "pairs", read_pipeline(trellis_root))


@pytest.fixture
def problem(trellis_root, people):
    return trellis_problem(trellis_root, people, seed=1)


def test_prompts_are_divided_and_pairs_with_them(problem, trellis_root, people):
    held = set(problem.held_out_prompts)
    trained = set(problem.train_prompts)
    assert (
        held | trained == set(NAMES)
        and not held & trained
        and len(held) == 1
        and problem.choosing == problem.held_out_prompts
    )
    for stage in (STRUCTURE, LATENT):
        pairs = problem.train_pairs[stage]
        assert {p.condition for p in pairs} == trained and len(pairs) == 3 * len(trained)
    assert [p.id for p in problem.train_pairs[STRUCTURE]] == [p.id for p in problem.train_pairs[LATENT]]
    again = trellis_problem(trellis_root, people, seed=1)
    assert all(stage.model.recompute for stage in problem.pipeline.stages)
    assert again.identity == problem.identity and again.held_out_prompts == problem.held_out_prompts
    halves = trellis_problem(trellis_root, people, held_out=0.5)
    unseen = {*halves.held_out_prompts, *halves.choosing_prompts}
    assert (
        len(halves.held_out_prompts) == 2
        and len(unseen) == 3
        and unseen | set(halves.train_prompts) == set(NAMES)
    )


def test_the_identity_names_all_sources(problem, trellis_root, people, tmp_path):
    assert json.loads(json.dumps(problem.identity)) == problem.identity
    assert set(problem.identity["pairs"]) == {STRUCTURE, LATENT}
    assert {"pipeline.json", STRUCTURE, LATENT, "slat_decoder_gs", "sparse_structure_encoder"} <= set(
        problem.identity["files"]
    )
    root = shutil.copytree(trellis_root, tmp_path / "root")
    with open(root / "pipeline.json", "a") as file:
        file.write(" ")
    other = trellis_problem(root, people, seed=1).identity
    assert {k for k in other if other[k] != problem.identity[k]} == {"files"}


def test_pairs_beside_the_networks_and_one_folder_per_stage(problem, trellis_root, people, tmp_path):
    root = shutil.copytree(trellis_root, tmp_path / "root")
    shutil.copytree(people, root / "pairs")
    assert trellis_problem(root, seed=1).identity == problem.identity
    alone = trellis_problem(trellis_root, people / LATENT, seed=1)
    assert alone.final is None and alone.train_pairs[LATENT]


def test_the_reward_orders_assets_as_the_labels_do(problem):
    pairs = problem.train_pairs[LATENT]
    for reward in (problem.reward, problem.chooser, problem.final):
        assert reward is not None
        sides = [
            problem.pipeline.decode(SparseBatch.join([getattr(p, side) for p in pairs]))
            for side in ("preferred", "rejected")
        ]
        scores = [reward(assets, [p.condition for p in pairs]) for assets in sides]
        assert all(
            s.shape == (len(pairs),) and s.dtype == torch.float32 and s.isfinite().all() for s in scores
        )
        if reward is problem.reward:
            assert float((scores[0] > scores[1]).float().mean()) > 0.6


def test_the_learned_reward_is_the_optimum_of_its_loss():
    generator = torch.Generator().manual_seed(0)
    worse = torch.randn(60, 6, generator=generator)
    better = worse + torch.tensor([1.0, 0, 0, 0, 0, 0]) + 0.3 * torch.randn(60, 6, generator=generator)
    reward = LinearReward(better, worse, ridge=0.5)
    weight = reward.weight.clone().requires_grad_()
    gaps = (better - worse).double() / reward.std
    (torch.nn.functional.softplus(-gaps @ weight).mean() + 0.25 * weight.square().sum() / 60).backward()
    assert float(weight.grad.abs().max()) < 1e-4
    assert float((gaps @ reward.weight > 0).double().mean()) > 0.9
    swapped = LinearReward(worse, better, ridge=0.5)
    assert torch.allclose(swapped.weight, -reward.weight, atol=1e-3)


def test_features_contain_the_position_and_the_colours_of_an_asset():
    asset = SplatAsset(
        means=torch.tensor([[-0.4, -0.4, -0.4], [0.4, 0.4, 0.4], [0.9, 0, 0]]),
        scales=torch.ones(3, 3),
        rotations=torch.ones(3, 4) / 2,
        features_dc=torch.tensor([[1.0, 0, 0], [0, 0, -1.0], [0, 0, 0]]),
        opacities=torch.tensor([0.5, 1.0, 1.0]),
    )
    values = features(asset, 2)
    mass = values[:8]
    colour = values[8:].view(8, 3)
    assert torch.allclose(mass, torch.tensor([1.5, 1, 1, 1, 1, 1, 1, 2.0]).log())
    assert torch.allclose(colour[0], torch.tensor([0.28209, 0, 0]), atol=1e-4)
    assert torch.allclose(colour[7], torch.tensor([0, 0, -0.28209]), atol=1e-4)
    assert not colour[1:7].any()


def test_the_loop_makes_pairs_of_the_first_stage(problem):
    tuned = copy.deepcopy(problem.pipeline.stages[1].model)
    with torch.no_grad():
        tuned.out_layer.bias += torch.tensor([1.0, -2.0, 0.5, 2.0])
    human = problem.train_pairs[STRUCTURE][:2]

    def made(network):
        return LoopPairMaker.from_problem(problem, {LATENT: network}, LoopPairsConfig(), 3, stage=STRUCTURE)(
            human
        )

    pairs = made(tuned)
    assert [p.id for p in pairs] == [f"{p.id}/0" for p in human] and all(
        p.stage == STRUCTURE and p.source == "loop" for p in pairs
    )
    for pair in pairs:
        problem.pipeline.stages[0].check(pair.id, pair.preferred)
        assert pair.reward_preferred is not None and pair.reward_preferred != pair.reward_rejected
    same = made(problem.pipeline.stages[1].model)
    assert all(p.provenance["same_structure"] for p in same)


def test_pairs_of_one_stage_train_only_that_stage(trellis_root, pipeline, tmp_path):
    folder = write_people(tmp_path / "pairs", pipeline.file, stages=(STRUCTURE,))
    problem = trellis_problem(trellis_root, folder)
    assert problem.train_pairs[STRUCTURE] and problem.chooser is None and problem.final is None
    with raising("pairs", "'latent'", "structure"):
        problem.train_pairs[LATENT]
    with raising("reward", "pairs"):
        problem.reward([], [])
    with raising("pairs", "'mesh'", "structure"):
        problem.train_pairs["mesh"]


@pytest.fixture
def copied(people, tmp_path):
    return shutil.copytree(people, tmp_path / "pairs")


def rewrite(folder, stage, change=lambda pairs: pairs, **meta):
    pairs, old = read_pairs(folder / stage)
    write_pairs(folder / stage, change(pairs), {**old, **meta})


def test_mismatched_pair_files_are_rejected(trellis_root, copied):
    rewrite(copied, LATENT, lambda pairs: pairs[:-1])
    with raising("'structure'", "'latent'", "1", "'a boat/1>2'"):
        trellis_problem(trellis_root, copied)


def test_pairs_of_another_convention_or_model_are_rejected(trellis_root, copied):
    rewrite(copied, LATENT, normalization={"mean": [0.0] * 4, "std": [1.0] * 4})
    with raising("TRELLIS-text-tiny/pipeline.json"):
        trellis_problem(trellis_root, copied)
    other = "x_1 is data"
    rewrite(copied, STRUCTURE, convention=other)
    with raising(repr(CONVENTION), repr(other)):
        trellis_problem(trellis_root, copied)


def test_pairs_without_embeddings_and_folders_without_pairs_are_rejected(trellis_root, copied, tmp_path):
    few = Conditioning(tokens={name: t for name, t in tokens().tokens.items() if name != "a lamp"})
    write_conditioning(copied / "conditioning.safetensors", few)
    with raising("conditioning", "'a lamp'"):
        trellis_problem(trellis_root, copied)
    (copied / "conditioning.safetensors").unlink()
    with raising(str(copied / "conditioning.safetensors"), kind=FileNotFoundError):
        trellis_problem(trellis_root, copied)
    with raising("pairs", "structure", "latent", str(tmp_path / "none"), kind=FileNotFoundError):
        trellis_problem(trellis_root, tmp_path / "none")


@pytest.mark.parametrize("tuned", [STRUCTURE, LATENT])
def test_a_run_of_one_stage_holds_its_network_alone(trellis_root, people, tuned):
    source = ProblemSource(pipeline=str(trellis_root), pairs=str(people), seed=1)
    complete = open_problem(source)
    problem = open_stage(source, tuned)
    is_meta = {
        stage.name: {parameter.is_meta for parameter in stage.model.parameters()}
        for stage in problem.pipeline.stages
    }
    assert is_meta == {name: {name != tuned} for name in (STRUCTURE, LATENT)}
    assert all(stage.model.recompute for stage in problem.pipeline.stages)
    # the same problem, whose samples load the other network and drop it
    assert problem.identity == complete.identity and problem.final is not None
    prompts = problem.held_out_prompts[:1] * 2
    seeds = [3, 4]
    scored, expected = (
        scores(p.pipeline, p.final, prompts, seeds, batch_size=1) for p in (problem, complete)
    )
    assert torch.equal(scored, expected)
    other = next(stage for stage in problem.pipeline.stages if stage.name != tuned)
    assert all(parameter.is_meta for parameter in other.model.parameters())
    with raising("mesh", STRUCTURE, LATENT):
        open_stage(source, "mesh")
    # the last stage, where none is named; weights of another type
    half = open_stage(ProblemSource(**{**vars(source), "dtype": "bfloat16"}), None)
    assert [next(stage.model.parameters()).is_meta for stage in half.pipeline.stages] == [True, False]
    assert torch.bfloat16 in {parameter.dtype for parameter in half.pipeline.stages[1].model.parameters()}


def test_each_network_is_loaded_once_for_all_batches(trellis_root, people, monkeypatch):
    source = ProblemSource(pipeline=str(trellis_root), pairs=str(people), seed=1)
    problem = open_stage(source, LATENT)
    loaded = []
    load = family.Trellis.load
    monkeypatch.setattr(
        family.Trellis,
        "load",
        lambda self, *rest, **more: loaded.append(more["stages"]) or load(self, *rest, **more),
    )
    scores(problem.pipeline, problem.final, problem.held_out_prompts[:1] * 3, [1, 2, 3], batch_size=1)
    assert loaded == [(STRUCTURE,)]
    # stages whose outputs are given are not loaded at all
    voxels_given = voxels_for(problem.pipeline, LATENT, problem.held_out_prompts[:1], [1])
    loaded.clear()
    scores(
        problem.pipeline,
        problem.final,
        problem.held_out_prompts[:1],
        [1],
        stages_given={LATENT: voxels_given},
    )
    assert loaded == []
