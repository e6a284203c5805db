"""TRELLIS.2 as a family: surfaces, one DPO step, export with merged adapters, meshes of the user, and the
loop.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import trimesh
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import train
from eg3d_rlhf.models.lora import add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.policies import save_policy
from eg3d_rlhf.models.sparse import SparseSample, feats_of
from eg3d_rlhf.models.trellis2 import VoxelAsset
from eg3d_rlhf.tuning.flow.base.conditioning import write_conditioning
from eg3d_rlhf.tuning.flow.base.export import export
from eg3d_rlhf.tuning.flow.base.ranking import read_ranking
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families import trellis2 as family
from eg3d_rlhf.tuning.flow.families import trellis2_assets as surfaces
from eg3d_rlhf.tuning.flow.families.opening import geometry_stage
from eg3d_rlhf.tuning.flow.families.trellis2 import FAMILY
from eg3d_rlhf.tuning.flow.families.trellis2_assets import surface_of
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw
from tests.rejections import raising
from tests.tuning.flow import labelled
from tests.tuning.flow.documented_commands import run_section
from tests.tuning.flow.families.trellis2.tiny_trellis2 import NAMES, tokens, write_pipeline
from tests.tuning.flow.one_step import check_one_dpo_step
from tests.tuning.flow.refused import train_rejected, write_people


def test_every_crossed_edge_that_four_voxels_share_has_a_face():
    coords = torch.cartesian_prod(*[torch.arange(2)] * 3).int()
    crossed = torch.zeros(8, 3, dtype=torch.bool)
    crossed[0, 0] = crossed[0, 2] = crossed[7, 1] = True  # the last lacks its neighbours
    asset = VoxelAsset(
        coords=coords, resolution=2, vertices=torch.full((8, 3), 0.5), crossed=crossed, split=torch.ones(8)
    )
    vertices, faces = surface_of(asset)
    assert torch.equal(vertices[0], torch.full([3], -0.25)) and torch.equal(
        vertices[7], torch.full([3], 0.25)
    )
    assert len(faces) == 4 and set(faces.flatten().tolist()) == {0, 1, 2, 3, 4, 6}  # voxels x = 0, and z = 0
    area = (
        torch.linalg.cross(
            vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]]
        ).norm(dim=1)
        / 2
    )
    torch.testing.assert_close(area, torch.full([4], 0.125))
    asset.split[[0, 3]] = 9.0  # the other diagonal of the face x = 0
    assert any({1, 2} <= set(face) for face in faces.tolist()) and not any(
        {1, 2} <= set(face) for face in surface_of(asset)[1].tolist()
    )


@pytest.mark.parametrize("name", ["structure", "shape_1024", "texture"])
def test_one_dpo_step(pipeline, name):
    check_one_dpo_step(pipeline, name, NAMES[:2])


@pytest.mark.long
def test_every_stage_learns_labels_and_is_compared_with_a_control(
    pipeline, trellis2_root, tmp_path, monkeypatch
):
    like = draw(pipeline, NAMES[:1], [0])[0][0]
    names = [f"c{i:02d}" for i in range(60)]
    labelled.check_labels_are_learnt(trellis2_root, like, tokens(), tokens(names), tmp_path, monkeypatch)


def test_adapters_are_merged_in_the_dtypes_of_the_files(pipeline, trellis2_root, tmp_path):
    stage = pipeline.stages[-1]
    model = copy.deepcopy(stage.model)
    add_lora(model, LoraConfig(rank=2, targets=stage.lora_targets), seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_policy(model, tmp_path / "adapter", {})
    report = export(
        family_of(trellis2_root), trellis2_root, tmp_path / "out", {"texture": tmp_path / "adapter"}
    )
    assert (
        report["tuned"]["texture"]["file"] == "ckpts/tex_1024.safetensors"
        and 0 < report["tuned"]["texture"]["rounding"] < 0.1
    )
    assert report["elsewhere"] == [] and 3 == sum(
        "_enc" in name and name.endswith(".safetensors") for name in report["kept"]
    )
    old, new = (
        load_file(root / "ckpts" / "tex_1024.safetensors") for root in (trellis2_root, tmp_path / "out")
    )
    assert {k: (t.dtype, t.shape) for k, t in old.items()} == {k: (t.dtype, t.shape) for k, t in new.items()}
    changed = {k for k in old if not torch.equal(old[k], new[k])}
    assert changed == {
        f"blocks.0.{k}.weight"
        for k in (
            "self_attn.to_qkv",
            "self_attn.to_out",
            "cross_attn.to_q",
            "cross_attn.to_kv",
            "cross_attn.to_out",
        )
    }
    opened = FAMILY.load(tmp_path / "out", tokens())  # whole, by itself
    runs = (opened, {}), (pipeline, {"texture": model.eval()}), (pipeline, {})
    merged, adapted, base = (generate(p, NAMES[:1], [0], models)[0].materials for p, models in runs)
    assert 10 * (merged - adapted).abs().mean() < (adapted - base).abs().mean()  # rounded to bfloat16
    with raising("export", "structure", "texture", "paint"):
        export(family_of(trellis2_root), trellis2_root, tmp_path / "out2", {"paint": tmp_path})


def test_train_rejects_pairs_that_do_not_fit(trellis2_root, tmp_path):
    root = shutil.copytree(trellis2_root, tmp_path / "root")
    shutil.copytree(trellis2_root.parent / "trellis", tmp_path / "trellis")
    g = torch.Generator().manual_seed(0)
    coords = torch.tensor([[0, 1, 2], [7, 7, 7]], dtype=torch.int32)
    textures = [SparseSample(coords, torch.randn(2, 4, generator=g), torch.zeros(2, 4)) for _ in range(2)]
    people = write_people(tmp_path / "a", "texture", *textures, tokens())
    others = write_people(tmp_path / "b", "texture", *textures, tokens(size=7))
    form = "{'1024': [5, 7], '512': [3, 7]}"
    train_rejected(root, others, "texture", tmp_path, "[L, 6]", "'512'", "'structure'", form)
    without_given = write_people(
        tmp_path / "c", "texture", *(SparseSample(x.coords, x.feats) for x in textures), tokens()
    )
    train_rejected(root, without_given, "texture", tmp_path, "preferred", "4 given", "0", "'texture'")
    write_pipeline(root, shape_slat_sampler={"name": "FlowEulerSampler", "params": {"cfg_strength": 3}})
    train_rejected(root, people, "texture", tmp_path, "guidance_strength", "cfg_strength")
    write_pipeline(root)
    state = load_file(root / "ckpts" / "tex_1024.safetensors")
    save_file(
        {name.replace("cross_attn", "attn2"): tensor for name, tensor in state.items()},
        root / "ckpts" / "tex_1024.safetensors",
    )
    names = [
        f"blocks.0.cross_attn.{part}"
        for part in (
            "k_rms_norm.gamma",
            "q_rms_norm.gamma",
            "to_kv.bias",
            "to_kv.weight",
            "to_out.bias",
            "to_out.weight",
            "to_q.bias",
            "to_q.weight",
        )
    ]
    train_rejected(root, people, "texture", tmp_path, f"missing: {', '.join(names)}", "unexpected: ")


def write_meshes(folder):
    """Write boxes ranked by their height, with embeddings of the prompts."""
    folder.mkdir()
    lines = []
    for i, name in enumerate(NAMES):
        for rank in (1, 2, 3):
            box = trimesh.creation.box((1.0, 0.4 + 0.1 * i, 1.2 - 0.3 * rank))
            box.export(folder / f"{i}-{rank}.ply")
            lines.append(json.dumps({"condition": name, "rank": rank, "asset": f"{i}-{rank}.ply"}))
    (folder / "ranking.jsonl").write_text("".join(line + "\n" for line in lines))
    write_conditioning(folder / "conditioning.safetensors", tokens())


@pytest.mark.long
def test_the_loop_on_structure_and_shape_with_its_controls(trellis2_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_meshes(tmp_path / "MESHES")
    few = "--steps=3 --batch=4 --lr=0.05 --table-noises=2 --seeds=0 --device=cpu".split()
    few += [f"--set={setting}" for setting in ("warmup=0", "choose_noises=0", "roles=reward")]
    assert run_section("TRELLIS.2's loop", trellis2_root, tmp_path, few) == ["new", "pairs", "train"]
    (run,) = (tmp_path / "runs").glob("00000-*")
    groups = json.loads((run / "ablation.json").read_text())["groups"]
    assert set(groups) == {"a", "d", "i", "regulariser", "randomised"}


def test_without_encoders_there_is_no_loop_and_a_notice_is_printed(copied, tmp_path, capsys):
    write_meshes(tmp_path / "MESHES")
    pairs = write_people(
        tmp_path / "PAIRS", "structure", torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 4), tokens()
    )
    source = ProblemSource(pipeline=str(copied), pairs=str(pairs))
    problem = family.FAMILY.open(source, "cpu")
    assert "sparse_structure_encoder" not in capsys.readouterr().err
    assert problem.reward is not None and [stage.name for stage in problem.pipeline.stages] == [
        "structure",
        "shape_512",
        "shape_1024",
    ]
    for path in (copied.parent / "trellis" / "ckpts").glob("ss_enc*"):
        path.unlink()
    assert (
        family.FAMILY.open(source, "cpu").reward is None
        and "sparse_structure_encoder" in capsys.readouterr().err
    )
    with raising("line 1", "sparse_structure_encoder"):
        read_ranking(
            tmp_path / "MESHES" / "ranking.jsonl",
            family.FAMILY.load(copied, None, stages=()),
            make_candidate=family.FAMILY.candidate,
        )


def test_a_mesh_of_the_user_becomes_latents_of_structure_and_shape(trellis2_root, tmp_path):
    write_meshes(tmp_path / "MESHES")
    pipeline = family.FAMILY.load(trellis2_root, None, stages=())
    lying = tmp_path / "y_up.glb"
    upright_file = tmp_path / "MESHES" / "0-1.ply"
    turn = trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0])
    trimesh.load_mesh(upright_file).apply_transform(turn).export(lying)
    (upright,), (glb,) = (pipeline.encode([surfaces.read_asset(path)]) for path in (upright_file, lying))
    assert list(upright) == list(glb) == ["structure", "shape_512", "shape_1024"]
    for stage in pipeline.stages[:-1]:
        stage.check(stage.name, upright[stage.name])
        torch.testing.assert_close(
            feats_of(upright[stage.name]), feats_of(glb[stage.name]), rtol=1e-3, atol=1e-4
        )


def test_sampled_assets_are_encoded_with_their_materials(pipeline):
    (asset,) = generate(pipeline, NAMES[:1], [0])
    (latents,) = pipeline.encode([asset])
    assert list(latents) == ["structure", "shape_512", "shape_1024", "texture"]
    for stage in ("structure", "shape_1024", "texture"):
        stage_of(pipeline, stage).check(stage, latents[stage])
    assert torch.equal(latents["texture"].given, latents["shape_1024"].feats)


def test_labels_tune_the_last_stage_of_the_geometry_by_default(trellis2_root, tmp_path):
    """`flow label` asks about the geometry; before, offline tuning took the texture of TRELLIS.2."""
    flags = [f"--pipeline={trellis2_root}", f"--assets={tmp_path}", "-n"]

    def tuned_stage(*more):
        done = CliRunner().invoke(train.main, ["--mode=offline", *flags, *more])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["stage"]

    assert tuned_stage() == geometry_stage(str(trellis2_root)) == "shape_1024"
    assert tuned_stage("--stage=texture") == "texture"
    # generators without a stage of textures keep the last stage
    assert geometry_stage("toy") is None
