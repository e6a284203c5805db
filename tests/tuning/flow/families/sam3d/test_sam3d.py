"""SAM 3D's folder: rejected settings, tuning of both stages and of the shape alone, sampling in few steps.

The tests use the reference folder of the released form.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import trimesh
import yaml
from click.testing import CliRunner
from PIL import Image

import train
from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.models.lora import adapted_layers
from eg3d_rlhf.models.policies import save_policy
from eg3d_rlhf.models.sparse import NamedBatch, NamedSample
from eg3d_rlhf.models.trellis.autoencoders import StructureEncoder, StructureVAEConfig
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.export import export
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.base.stage import FlowPath
from eg3d_rlhf.tuning.flow.families import check_source, family_of
from eg3d_rlhf.tuning.flow.families import sam3d as family
from eg3d_rlhf.tuning.flow.families import sam3d_files as files
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.compat.family_reference import Case, folders
from tests.modes import flow_works
from tests.rejections import check_message, raising, rejected
from tests.tuning.flow import labelled
from tests.tuning.flow.documented_commands import FEW
from tests.tuning.flow.one_step import check_one_dpo_step, pairs_of
from tests.tuning.flow.refused import train_rejected, write_people

NAMES = ("a chair", "a lamp", "a tree", "a house")


@pytest.fixture(scope="module")
def released():
    cases = [param.values[0] for param in folders("flow_sam3d")]
    case = next((Case(folder) for folder in cases if folder.name.startswith("released")), None)
    if case is None:
        pytest.skip("this set has no flow_sam3d/released*/case.json")
    return case.file(case.fact("root"))


@pytest.fixture
def root(released, tmp_path):
    """Return a copy of the folder that a test may change."""
    return shutil.copytree(released, tmp_path / "ROOT")


@pytest.fixture(scope="module")
def width(released):
    """Return the number of channels of a conditioning token."""
    return files.read_pipeline(released).generators["structure"].config.cond_channels


def tokens(width: int, names=NAMES, **more) -> Conditioning:
    g = torch.Generator().manual_seed(5)
    made = {
        name: {stage: torch.randn(7, width, generator=g) for stage in files.STAGES} | more for name in names
    }
    return Conditioning(tokens=made, zero_null=True)


@pytest.fixture(scope="module")
def pipeline(released, width):
    return family.FAMILY.load(released, tokens(width))


def changed(root, file, change):
    content = yaml.safe_load((root / file).read_text())
    change(content)
    (root / file).write_text(yaml.safe_dump(content, sort_keys=False))
    return root


def flow(content):
    return content["module"]["generator"]["backbone"]


def network(content):
    return flow(content)["reverse_fn"]["backbone"]


def embedder(content):
    return content["module"]["condition_embedder"]["backbone"]


def cut(content):
    return content["ss_preprocessor"]["img_mask_pointmap_joint_transform"]


@pytest.mark.parametrize(
    ("file", "change", "names"),
    [
        (
            "ss_generator.yaml",
            lambda c: flow(c).update(reversed_timestamp=True),
            ("ss_generator.yaml", "reversed_timestamp"),
        ),
        (
            "ss_generator.yaml",
            lambda c: flow(c).update(_target_="sam3d_objects.Diffusion"),
            ("ShortCut", "FlowMatching", "Diffusion"),
        ),
        (
            "ss_generator.yaml",
            lambda c: flow(c)["reverse_fn"].update(_target_="sam3d_objects.PointmapCFG"),
            ("ClassifierFree", "PointmapCFG"),
        ),
        (
            "ss_generator.yaml",
            lambda c: network(c).update(colour=2),
            ("ss_generator.yaml", "unknown: colour"),
        ),
        (
            "ss_generator.yaml",
            lambda c: network(c).update(protect_modality_list=["scale"]),
            ("ss_generator.yaml", "unknown: protect_modality_list"),
        ),
        (
            "ss_generator.yaml",
            lambda c: network(c).pop("num_blocks"),
            ("ss_generator.yaml", "missing: num_blocks"),
        ),
        (
            "ss_generator.yaml",
            lambda c: network(c).update(qk_rms_norm=False),
            ("MixtureConfig", "qk_rms_norm"),
        ),
        (
            "ss_generator.yaml",
            lambda c: network(c).update(force_zeros_cond=False),
            ("ss_cfg_strength", "force_zeros_cond: true"),
        ),
        (
            "slat_generator.yaml",
            lambda c: network(c).pop("force_zeros_cond"),
            ("slat_cfg_strength", "force_zeros_cond: true"),
        ),
        (
            "ss_generator.yaml",
            lambda c: flow(c)["loss_weights"].pop("scale"),
            ("loss_weights", "scale"),
        ),
        (
            "ss_generator.yaml",
            lambda c: flow(c)["training_time_sampler_fn"].update(_target_="x.uniform"),
            ("lognorm_sampler", "uniform"),
        ),
        (
            "ss_generator.yaml",
            lambda c: c.pop("module"),
            ("module.generator.backbone", "reverse_fn.backbone"),
        ),
        ("slat_generator.yaml", lambda c: network(c).update(pe_mode="rope"), ("pe_mode", "'ape'", "'rope'")),
        ("pipeline.yaml", lambda c: c.update(slat_std=[0.0] * 8), ("slat_mean", "slat_std")),
        (
            "pipeline.yaml",
            lambda c: c.update(use_stage1_distillation=True),
            ("use_stage1_distillation", "few_steps"),
        ),
        (
            "pipeline.yaml",
            lambda c: c.update(ss_condition_input_mapping=["image"]),
            ("ss_condition_input_mapping",),
        ),
        (
            "ss_generator.yaml",
            lambda c: flow(c).update(time_scale=0),
            ("ss_generator.yaml", "time_scale", "0"),
        ),
        ("ss_generator.yaml", lambda c: flow(c).update(loss_weights=[1]), ("ss_generator.yaml",)),
        (
            "pipeline.yaml",
            lambda c: c.update(pose_decoder_name="Other"),
            ("pose_decoder_name", "ScaleShiftInvariant", "'Other'"),
        ),
        ("pipeline.yaml", lambda c: cut(c).append(cut(c)[0]), ("ss_preprocessor", "resize_all_to_same_size")),
        ("pipeline.yaml", lambda c: c.update(slat_rescale_t=0), ("pipeline.yaml", "slat", "rescale_t")),
        ("pipeline.yaml", lambda c: c.pop("slat_preprocessor"), ("'slat_preprocessor'",)),
        (
            "pipeline.yaml",
            lambda c: cut(c).append({"_target_": "sam3d_objects.flip"}),
            ("ss_preprocessor", "flip"),
        ),
        ("pipeline.yaml", lambda c: cut(c).pop(), ("ss_preprocessor", "resize_all_to_same_size")),
        (
            "pipeline.yaml",
            lambda c: c["ss_preprocessor"]["mask_transform"]["transforms"][1].pop("interpolation"),
            ("ss_preprocessor", "resize_all_to_same_size", "crop_around_mask_with_padding"),
        ),
        (
            "pipeline.yaml",
            lambda c: c["ss_preprocessor"]["mask_transform"]["transforms"][1].update(size=13),
            ("[13, ",),
        ),
        (
            "pipeline.yaml",
            lambda c: c["ss_preprocessor"]["pointmap_normalizer"].update(_target_="x.Other"),
            ("ss_preprocessor", "ObjectCentricSSI", "Other"),
        ),
    ],
)
def test_settings_that_would_change_the_result_are_rejected(root, file, change, names):
    with raising(*names):
        files.read_pipeline(changed(root, file, change))


def test_without_guidance_no_empty_conditioning_is_needed(root):
    for short in files.SHORT.values():
        changed(root, f"{short}_generator.yaml", lambda c: network(c).update(force_zeros_cond=False))
    changed(root, "pipeline.yaml", lambda c: c.update(ss_cfg_strength=0, slat_cfg_strength=0))
    assert not any(sampling.cfg_strength for sampling in files.read_pipeline(root).sampling.values())


def test_embedders_that_are_rejected_and_those_that_are_read(root):
    def embedder_after(change):
        changed(root, "slat_generator.yaml", change)
        return files.load_embedder(files.read_pipeline(root).generators["latent"])

    made = embedder_after(lambda c: embedder(c)["embedder_list"][0][1][0].__setitem__(1, None))
    assert made.frames == ["full", "cropped"]
    for change, names in (
        (lambda c: embedder(c).update(use_pos_embedding="rope"), ("use_pos_embedding", "learned", "random")),
        (lambda c: embedder(c).update(use_pos_embedding="random"), ("idx_emb [3, ", "[3, 1, ")),
        (
            lambda c: embedder(c)["embedder_list"][0][0].update(_target_="x.Clip"),
            ("Dino", "PointPatchEmbed", "'Clip'"),
        ),
    ):
        with raising(*names):
            embedder_after(change)
        changed(root, "slat_generator.yaml", lambda c: embedder(c).update(use_pos_embedding="learned"))


def test_files_that_are_missing(root, tmp_path):
    with raising("SAM 3D", "pipeline.yaml", str(tmp_path), kind=FileNotFoundError):
        files.read_pipeline(tmp_path)
    with raising("ss_encoder.yaml", "ss_encoder.safetensors", kind=FileNotFoundError):
        files.load_part(files.read_pipeline(root), "structure encoder")
    (root / "ss_decoder.ckpt").unlink()
    with raising("ss_decoder_ckpt_path", "'ss_decoder.ckpt'", kind=FileNotFoundError):
        files.read_pipeline(root)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/hf"])
def test_the_full_repository_is_recognised_too(root, tmp_path, place):
    shutil.copytree(root, tmp_path / "REPO" / place)
    assert (
        family_of(tmp_path / "REPO").name == "sam3d"
        and files.read_pipeline(tmp_path / "REPO").root == tmp_path / "REPO" / place
    )


def test_the_repositorys_licence_is_passed_on(root, pipeline, tmp_path):
    place = shutil.copytree(root, tmp_path / "REPO" / "checkpoints")
    (tmp_path / "REPO" / "LICENSE").write_text("terms")
    save_policy(check_one_dpo_step(pipeline, "latent", NAMES[:2]), tmp_path / "latent", {})
    for given, kept in ((tmp_path / "REPO", "checkpoints"), (place, "")):
        out = tmp_path / f"TUNED{kept}"
        assert "LICENSE" in export(family_of(given), given, out, {"latent": tmp_path / "latent"})["kept"]
        assert (out / "LICENSE").read_text() == "terms" and (out / kept / "slat_generator.ckpt").is_file()


@pytest.mark.parametrize("name", files.STAGES)
def test_one_dpo_step(pipeline, name):
    model = check_one_dpo_step(pipeline, name, NAMES[:2])
    if name == "structure":
        blocks = range(model.config.num_blocks)
        groups = ("shape", "6drotation_normalized")
        expected = {
            f"blocks.{b}.self_attn.{layer}.{g}"
            for b in blocks
            for layer in ("to_qkv", "to_out")
            for g in groups
        }
        assert {n for n in adapted_layers(model) if "self_attn" in n} == expected and len(
            adapted_layers(model)
        ) == 10 * len(blocks)


@pytest.mark.long
def test_both_stages_learn_labels_and_are_compared_with_a_control(
    pipeline, released, width, tmp_path, monkeypatch
):
    like = draw(pipeline, NAMES[:1], [0])[0][0]
    ranked = tokens(width, [f"c{i:02d}" for i in range(60)])
    labelled.check_labels_are_learnt(released, like, tokens(width), ranked, tmp_path, monkeypatch)


def test_the_option_parts_selects_the_latents_that_are_tuned(released, pipeline, width, tmp_path):
    """With the shape alone, pairs have no pose, only the shape has adapters, and the same shapes are sampled.

    With the file's weights, pairs are unchanged.
    """
    both = pairs_of(pipeline, "structure", NAMES[:1])[0]
    people = write_people(tmp_path / "PAIRS", "structure", both.preferred, both.rejected, tokens(width))

    def opened(parts):
        return family.FAMILY.open(
            ProblemSource(pipeline=str(released), pairs=str(people), parts=parts), "cpu"
        )

    shape, file, all_parts = (opened(parts) for parts in ("shape", "file", "all"))
    assert set(shape.train_pairs["structure"][0].preferred.tensors) == {"shape"}
    stage = shape.pipeline.stages[0]
    as_trained = all_parts.pipeline.stages[0]
    noise, given = (made.noise([3], [None]) for made in (stage, as_trained))
    assert torch.equal(noise["shape"], given["shape"])
    cond = pipeline.conditioning(NAMES[:1], "structure")
    with torch.no_grad():
        alone, together = (
            made.velocity(x, torch.tensor([0.3]), cond) for made, x in ((stage, noise), (as_trained, given))
        )
    assert torch.equal(alone["shape"], together["shape"])
    layers = adapted_layers(check_one_dpo_step(shape.pipeline, "structure", NAMES[:2]))
    assert layers and all("shape" in layer.split(".") for layer in layers)
    assert (
        file.pipeline.stages[0].path.weights["translation"] == 1
        and all_parts.pipeline.stages[0].path.weights is None
    )
    assert set(file.train_pairs["structure"][0].preferred.tensors) == set(both.preferred.tensors)
    assert len({json.dumps(problem.identity, sort_keys=True) for problem in (shape, file, all_parts)}) == 3
    with raising("--parts", "--pipeline"):
        check_source(ProblemSource(parts="shape"))


def test_errors_are_weighted_by_latent():
    g = torch.Generator().manual_seed(0)
    v, x_0, eps = (
        NamedBatch({"shape": torch.randn(3, 64, 2, generator=g), "scale": torch.randn(3, 1, 3, generator=g)})
        for _ in range(3)
    )
    path = FlowPath(sigma_min=0.0, weights={"scale": 0.25, "shape": 0.0})
    want = ((v["scale"] - (eps["scale"] - x_0["scale"])).square().mean((1, 2))) / 4
    torch.testing.assert_close(path.errors(v, x_0, eps), want)
    even = FlowPath(sigma_min=0.0, weights={"scale": 0.5, "shape": 0.5})
    torch.testing.assert_close(even.errors(v, x_0, eps), FlowPath(sigma_min=0.0).errors(v, x_0, eps))


def test_sampling_in_few_steps_and_with_a_pose(released, width, tmp_path):
    embeddings = tokens(
        width, **{family.SCALE: torch.full([3], 2.0), family.SHIFT: torch.tensor([0.0, 0.0, 5.0])}
    )
    write_conditioning(tmp_path / "conditioning.safetensors", embeddings)
    flow_works.flow(
        "new",
        tmp_path / "WORK",
        f"--pipeline={released}",
        f"--conditioning={tmp_path / 'conditioning.safetensors'}",
        "--each=2",
    )
    flow_works.flow("sample", tmp_path / "WORK", "--set=few_steps=2", "--device=cpu")
    few = Work.open(tmp_path / "WORK").lines()
    assert {tuple(sorted(row["pose"])) for row in few} == {("rotation", "scale", "translation")} and len(
        few
    ) == 2 * (len(NAMES) - 1)
    assert few[0]["pose"]["translation"] != few[1]["pose"]["translation"]
    assert (
        json.loads((tmp_path / "WORK" / "drawn" / "base" / "drawn_from.json").read_text())["few_steps"] == 2
    )


def write_encoder(root):
    """Write an encoder with random weights and the sizes of the structure's decoder."""
    args = {
        "in_channels": 1,
        "latent_channels": 8,
        "num_res_blocks": 1,
        "num_res_blocks_middle": 1,
        "channels": [4, 8],
    }
    target = "sam3d_objects.model.backbone.tdfy_dit.models.sparse_structure_vae.SparseStructureEncoder"
    (root / "ss_encoder.yaml").write_text(yaml.safe_dump({"_target_": target, **args, "use_fp16": False}))
    torch.manual_seed(0)
    torch.save(StructureEncoder(StructureVAEConfig(**args)).state_dict(), root / "ss_encoder.ckpt")
    return root


def test_the_shape_alone_is_tuned_on_meshes_of_the_user(root, width, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MESHES").mkdir()
    write_conditioning(tmp_path / "MESHES" / "conditioning.safetensors", tokens(width))
    lines = []
    for rank, mesh in enumerate(
        (trimesh.creation.box((1, 1, 2)), trimesh.creation.icosphere(subdivisions=2)), 1
    ):
        mesh.export(tmp_path / "MESHES" / f"{rank}.ply")
        lines += [json.dumps({"condition": name, "rank": rank, "asset": f"{rank}.ply"}) for name in NAMES]
    (tmp_path / "MESHES" / "ranking.jsonl").write_text("\n".join(lines))
    made = ("--labels=MESHES", "--pairs-only", "--device=cpu")
    flow_works.flow("new", "WITHOUT", f"--pipeline={root}", "--conditioning=MESHES", "--device=cpu")
    check_message(flow_works.flow("tune", "WITHOUT", *made, code=2), ("ss_encoder.yaml",))
    flow_works.flow(
        "new", "WORK", f"--pipeline={write_encoder(root)}", "--conditioning=MESHES", "--device=cpu"
    )
    flow_works.flow("tune", "WORK", *made)
    training = ["--mode=circular-dpo", f"--pipeline={root}", "--pairs=WORK/pairs", "--stage=structure", *FEW]
    rejected(CliRunner().invoke(train.main, training), "--set parts=shape")
    done = CliRunner().invoke(train.main, [*training, "--set=parts=shape"])
    assert done.exit_code == 0, (done.output, done.exception)
    (run,) = (tmp_path / "runs").glob("0*")
    export(family_of(root), root, tmp_path / "TUNED", {"structure": run / "structure"})
    old, new = (
        files.load_flow(files.read_pipeline(place).generators["structure"]).state_dict()
        for place in (root, tmp_path / "TUNED")
    )
    names = [name for name in old if not torch.equal(old[name], new[name])]
    assert names and all("shape" in name.split(".") for name in names)


def test_voxels_of_a_surface():
    """The voxels are all around a box and none are inside."""
    voxels = family.surface_voxels(Mesh(*mesh_of(trimesh.creation.box((3, 3, 3)))), 8)
    inner = ((voxels > 0) & (voxels < 7)).all(1)
    assert len(voxels) == 8**3 - 6**3 and not inner.any() and voxels.dtype == torch.int32
    flat = family.surface_voxels(Mesh(*mesh_of(trimesh.creation.box((4, 4, 1)))), 8)
    assert int(flat[:, 2].min()) == 3 and int(flat[:, 2].max()) == 4 and int(flat[:, 0].max()) == 7


def mesh_of(mesh):
    return torch.tensor(np.asarray(mesh.vertices)), torch.tensor(np.asarray(mesh.faces))


def write_image(folder, opaque=False, z=4.0):
    folder.mkdir(exist_ok=True)
    pixels = np.full((20, 30, 4), 90, np.uint8)
    pixels[..., 3] = 255 if opaque else 0
    pixels[5:15, 8:20, 3] = 255
    Image.fromarray(pixels, "RGBA").save(folder / "a.png")
    np.save(folder / "a.npy", np.full((20, 30, 3), z, np.float32))
    return folder / "a.png"


def test_unsuitable_images_are_rejected(released, tmp_path):
    what = files.read_pipeline(released).cuts["structure"]
    with raising("a.png", "opaque", "background"):
        family.inputs_of(write_image(tmp_path, opaque=True), what, True)
    with raising("a.npy", "z > 0"):
        family.inputs_of(write_image(tmp_path, z=-1.0), what, True)
    (tmp_path / "a.npy").unlink()
    with raising(str(tmp_path / "a.npy"), kind=FileNotFoundError):
        family.inputs_of(tmp_path / "a.png", what, True)
    assert "pointmap" not in family.inputs_of(tmp_path / "a.png", what, False)


def test_train_rejects_pairs_that_do_not_fit(root, pipeline, width, tmp_path):
    both = pairs_of(pipeline, "structure", NAMES[:1])[0]
    latents = both.preferred, both.rejected
    people = write_people(tmp_path / "a", "structure", *latents, tokens(width))
    narrow = write_people(tmp_path / "b", "structure", *latents, tokens(width - 1))
    train_rejected(root, narrow, "structure", tmp_path, "conditioning", f"[L, {width}]", "'structure'")
    grids = write_people(
        tmp_path / "c", "structure", torch.zeros(2, 4, 4, 4), torch.ones(2, 4, 4, 4), tokens(width)
    )
    train_rejected(root, grids, "structure", tmp_path, "preferred", "grid")
    some = [
        NamedSample({name: x for name, x in latent.tensors.items() if name != "scale"}) for latent in latents
    ]
    less = write_people(tmp_path / "d", "structure", *some, tokens(width))
    train_rejected(root, less, "structure", tmp_path, "preferred", "6drotation_normalized", "scale")
    other = Conditioning(tokens=tokens(width).tokens, encoder="another", zero_null=True)
    pairs_of_another = write_people(tmp_path / "e", "structure", *latents, other)
    train_rejected(root, pairs_of_another, "structure", tmp_path, "SAM 3D", "another")
    state = torch.load(root / "ss_generator.ckpt", weights_only=True)["state_dict"]
    torch.save(
        {"state_dict": {n.replace(".cross_attn.", ".attn2."): t for n, t in state.items()}},
        root / "ss_generator.ckpt",
    )
    lacking = "missing: blocks.0.cross_attn.6drotation_normalized.to_kv.bias, "
    train_rejected(root, people, "structure", tmp_path, lacking, "unexpected: ")
