"""Data and training of RewardCS: the rule of the split, controls, and resumed trainings; the long test
checks claim C3.
"""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.geometry.mesh import count_edges, find_parts
from eg3d_rlhf.modes.mesh_reward import main
from eg3d_rlhf.rewards.meshes import dataset, patches, settings
from eg3d_rlhf.rewards.meshes import mesh_reward_training as run
from eg3d_rlhf.rewards.meshes.dataset import (
    KINDS,
    SOURCES,
    area_only,
    generate_meshes,
    load_mesh,
    randomised_labels,
    rotated,
    severity_of,
    with_permuted_faces,
)
from eg3d_rlhf.rewards.meshes.mesh_reward_training import MeshTraining, open_meshes, run_table
from eg3d_rlhf.rewards.meshes.model import load_mesh_reward
from eg3d_rlhf.rewards.meshes.patches import compute_mesh_patches, compute_patches, make_plan
from eg3d_rlhf.rewards.meshes.settings import MeshRewardTraining, PatchOptions
from eg3d_rlhf.rewards.meshes.surfaces import closed_level, cube, marching_tetrahedra, signed_volume
from tests.rejections import check_message, raising, rejected

TINY = {
    "shapes": 80,
    "resolution": 8,
    "patches": 8,
    "faces": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "steps": 60,
    "batch": 8,
}


@pytest.fixture(scope="module")
def meshes():
    return open_meshes(MeshRewardTraining(**TINY))


def test_scores_follow_the_severity_and_the_split_rule_is_exact(meshes):
    for label in meshes.labels:
        assert label.preferred is (True if label.score >= 4.0 else False if label.score <= 3.5 else None)
        assert label.target == label.score / 5
    between = [label for label in meshes.labels if label.preferred is None]
    assert len(between) == 4 and all(3.5 < label.score < 4.0 for label in between)
    learnt, held = meshes.split(0.25)
    used = {label.seed for label in (*learnt, *held)}
    assert not {label.seed for label in learnt} & {label.seed for label in held}
    assert used == {label.seed for label in meshes.labels} - {label.seed for label in between}
    severities = [severity_of(i, u) for i in range(40) for u in (0.0, 0.999)]
    assert min(severities) == 0 and max(severities) > 0.99


def test_shapes_depend_on_their_number_and_the_seed_alone(meshes):
    options = PatchOptions(patches=8, faces=8)
    again, other = (generate_meshes("heads", 3, options, 8, seed) for seed in (0, 1))
    assert (
        torch.equal(again.patches.features, meshes.patches.features[:3])
        and again.prompts == meshes.prompts[:3]
    )
    assert not torch.equal(other.patches.features, again.patches.features)


def test_flags_name_every_source_and_patchifier():
    assert settings.SOURCE_NAMES == tuple(SOURCES)
    assert settings.PATCHIFIER_NAMES == tuple(patches.PATCHIFIERS)


@pytest.mark.parametrize("source", list(SOURCES))
def test_every_defect_is_there_and_every_mesh_is_closed(source):
    lattice = cube(20)
    for kind in KINDS[source]:
        made = []
        for severity in (0.0, 1.0):
            level = SOURCES[source](lattice, kind, severity, torch.Generator().manual_seed(7))[0]
            mesh = marching_tetrahedra(closed_level(level, lattice), lattice)
            assert count_edges(mesh.faces.numpy()).watertight and float(signed_volume(mesh)) > 0
            made.append(mesh)
        good, bad = made
        changes = {
            "noise": len(bad.faces) > len(good.faces),
            "holes": signed_volume(bad) < 0.98 * signed_volume(good),
            "floaters": find_parts(bad.faces.numpy(), len(bad.vertices))[0] > 1,
            "second-nose": signed_volume(bad) > signed_volume(good),
            "no-nose": signed_volume(bad) < signed_volume(good),
        }
        assert bool(changes[kind]), kind
        assert find_parts(good.faces.numpy(), len(good.vertices))[0] == 1


def test_rotated_patches_are_those_of_rotated_surfaces():
    lattice = cube(8)
    options = PatchOptions(patches=6, faces=8)
    level = SOURCES["heads"](lattice, "noise", 0.5, torch.Generator().manual_seed(1))[0]
    mesh = marching_tetrahedra(level, lattice)
    plan = make_plan(mesh, options)
    known = compute_patches(mesh.vertices, plan, options)
    for quarters in range(4):
        angle = quarters * np.pi / 2
        turn = (
            torch.tensor([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
            .round()
            .float()
        )
        for mirrored in (False, True):
            vertices = mesh.vertices @ turn.T * torch.tensor([-1.0 if mirrored else 1.0, 1, 1])
            faces = plan._replace(faces=plan.faces.flip(1)) if mirrored else plan
            expected = compute_patches(vertices, faces, options)
            moved = rotated(known, torch.tensor([quarters]), torch.tensor([mirrored]))
            torch.testing.assert_close(moved.features, expected.features, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moved.centres, expected.centres, rtol=1e-4, atol=1e-4)


def test_permuted_patches_keep_their_faces_and_controls_remove_information(meshes):
    patches, _ = meshes.select(meshes.labels[:4])
    mixed = with_permuted_faces(patches, torch.Generator().manual_seed(0))
    assert not torch.equal(mixed.features, patches.features)
    torch.testing.assert_close(mixed.features.sum(2), patches.features.sum(2), rtol=1e-4, atol=1e-4)
    order = torch.cdist(mixed.features[0, 0], patches.features[0, 0]).argmin(1)
    assert torch.equal(mixed.centres[0, 0], patches.centres[0, 0][order])
    bare = area_only(patches)
    assert (
        torch.equal(bare.features[..., 0], patches.features[..., 0])
        and float(bare.features[..., 1:].abs().max()) == 0
    )
    assert float(bare.centres.abs().max()) == 0
    permuted_labels = randomised_labels(meshes.labels, 0)
    assert [label.seed for label in permuted_labels] == [label.seed for label in meshes.labels]
    assert sorted(label.score for label in permuted_labels) == sorted(label.score for label in meshes.labels)
    assert [label.score for label in permuted_labels] != [label.score for label in meshes.labels]


def test_an_interrupted_training_continues_to_the_same_reward(meshes):
    options = MeshRewardTraining(**TINY)
    straight = MeshTraining(options, meshes)
    straight.run(12)
    first = MeshTraining(options, meshes)
    first.run(7)
    tensors, meta = first.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    second = MeshTraining(options, meshes)
    second.load(tensors, json.loads(json.dumps(meta)))
    second.run(12)
    assert second.bandwidth == straight.bandwidth
    for name, value in straight.reward.state_dict().items():
        assert torch.equal(value, second.reward.state_dict()[name]), name
    repeated = MeshTraining(options, meshes)
    repeated.run(12)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            straight.reward.state_dict().values(), repeated.reward.state_dict().values(), strict=True
        )
    )


def test_the_bandwidth_has_a_lower_limit(meshes):
    for least in (0.7, 3.0):
        training = MeshTraining(MeshRewardTraining(**TINY, bandwidth=least), meshes)
        training.run(5)
        assert training.bandwidth >= least and (least < 3 or training.bandwidth == pytest.approx(3.0))


def command(*flags):
    flag_names = {param.name for param in main.params}
    tiny = [
        f"--{name}={value}" if name in flag_names else f"--set={name}={value}" for name, value in TINY.items()
    ]
    return CliRunner().invoke(main, [*tiny, *map(str, flags)])


def test_the_command_writes_a_reward_and_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    done = command(f"--outdir={tmp_path}")
    assert done.exit_code == 0, done.output
    out = tmp_path / "00000-mesh-reward-heads"
    cut = tmp_path / "00001-mesh-reward-heads"
    reward = load_mesh_reward(out / run.REWARD)
    report = json.loads((out / run.REPORT).read_text())
    assert report["held_out"]["n"] == [10, 9] and reward.provenance["training"]["shapes"] == 80
    assert reward.resolution == 8 and "a round head" in reward.text.prompts
    original_run = MeshTraining.run

    def stops(self, until):
        if self.finished_steps:
            raise KeyboardInterrupt
        return original_run(self, until)

    monkeypatch.setattr(MeshTraining, "run", stops)
    assert command(f"--outdir={tmp_path}").exit_code == 130
    monkeypatch.setattr(MeshTraining, "run", original_run)
    assert not (cut / run.REWARD).exists() and list(cut.glob("checkpoint-*.safetensors"))
    other = CliRunner().invoke(main, [f"--resume={cut}", "--lr=0.1"])
    rejected(other, "--lr", "--resume")
    resumed = CliRunner().invoke(main, [f"--resume={cut}"])
    assert resumed.exit_code == 0, resumed.output
    assert (cut / run.REWARD).read_bytes() == (out / run.REWARD).read_bytes()
    assert (cut / "stats.jsonl").read_bytes() == (out / "stats.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--seeds=0,1", "--set", "randomised=true"], ("--seeds", "randomised")),
        (["--set=batch=7"], ("--set", "batch", "7")),
        (["--set=batch=400"], ("batch", "400")),
        (["--set", "width=11"], ("width", "11", "heads")),
        (["--set", "nothing=1"], ("--settings", "nothing")),
        (["--data=none.jsonl"], ("--data", "none.jsonl")),
        (["--set", "place=box"], ("--set turns=false",)),
        (["--set", "patchifier=maps", "--set", "faces=9"], ("4, 16, 64", "9")),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, names):
    result = command(f"--outdir={tmp_path / 'runs'}", *flags)
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    check_message(error, names)
    assert not (tmp_path / "runs").exists()


def test_meshes_of_files(tmp_path):
    import trimesh

    rows = []
    for i in range(12):
        body = trimesh.creation.box((1, 1, 1 + i)) if i % 2 else trimesh.creation.icosphere(2, 0.3 + 0.1 * i)
        if i == 3:
            body.invert()
        body.export(tmp_path / f"{i}.{('ply', 'obj', 'glb')[i % 3]}")
        label = {"label": 0} if i % 2 else {"score": 4.5}
        rows.append({"mesh": f"{i}.{('ply', 'obj', 'glb')[i % 3]}", "prompt": "a ball", **label})
    path = tmp_path / "meshes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert float(signed_volume(load_mesh(tmp_path / "3.ply"))) == pytest.approx(4.0, rel=1e-4)
    options = PatchOptions(patches=8, faces=4)
    meshes = dataset.read(path, options)
    assert [label.preferred for label in meshes.labels] == [i % 2 == 0 for i in range(12)] and set(
        meshes.prompts
    ) == {"a ball"}
    alone = compute_mesh_patches([load_mesh(tmp_path / "4.obj")], options)
    torch.testing.assert_close(meshes.patches.features[4:5], alone.features)
    done = command(
        f"--outdir={tmp_path}", f"--data={path}", "--set", "held_out=0.4", "--set", "batch=4", "--steps=3"
    )
    assert done.exit_code == 0 and re.search(r"\bAUC [01]\.\d{3}\b", done.output), done.output
    # a second label of every mesh, by another path: both labels stay in one split, and count as one mesh
    again = [{**row, "mesh": f"./{row['mesh']}"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + again))
    twice = dataset.read(path, options)
    assert [label.seed for label in twice.labels] == [*range(12), *range(12)]
    torch.testing.assert_close(twice.patches.features[12:], twice.patches.features[:12])
    train, test = twice.split(0.5)
    assert len(train) == len(test) == 12 and not {row.seed for row in train} & {row.seed for row in test}
    for bad in (
        {"mesh": "none.ply", "score": 4},
        {"mesh": "0.ply", "score": 9},
        {"mesh": "0.ply"},
        {"mesh": "meshes.jsonl", "score": 1},
    ):
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(bad) + "\n")
        with raising("--data", "meshes.jsonl", "line 2"):
            dataset.read(path, options)
    # of a valid score and an invalid label, the message names the invalid one, and the other way round
    for score, label, named in ((4.25, 7, "7"), ("4.25", 1, "'4.25'")):
        path.write_text(json.dumps({"mesh": "0.ply", "score": score, "label": label}) + "\n")
        with raising("--data", "meshes.jsonl", "line 1", named):
            dataset.read(path, options)


def test_the_table_keeps_finished_trainings(tmp_path):
    lines: list[str] = []
    options = MeshRewardTraining(**{**TINY, "steps": 3})
    assert (
        set(run_table(options, tmp_path, [0], say=lines.append)["summary"]) == set(run.ARMS)
        and len(lines) == 4
    )
    run_table(options, tmp_path, [0], say=lines.append)
    assert len(lines) == 4
    with raising("--resume"):
        run_table(MeshRewardTraining(**{**TINY, "steps": 4}), tmp_path, [0])


@pytest.mark.long
def test_c3(tmp_path):
    """Generated meshes, 400 + 400 unpaired, five seeds; docs/lab-book/2026-11-text-to-3d.md has the table."""
    options = MeshRewardTraining(resolution=16, patches=32, faces=16, width=48, depth=2, steps=300, lr=3e-3)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    table = run_table(options, tmp_path, range(5))["summary"]
    torch.set_num_threads(threads_before)
    with_term = table["lambda 1"]
    without = table["lambda 0"]
    assert min(with_term["auc"], without["auc"]) >= 0.9
    assert with_term["divergence_fixed"] >= 2 * without["divergence_fixed"]  # the term separates both kinds
    assert abs(table["randomised"]["auc"] - 0.5) <= 0.1
    assert (
        table["area only"]["auc_by_kind"]["second-nose"] < 0.65 < 0.9 <= without["auc_by_kind"]["second-nose"]
    )
