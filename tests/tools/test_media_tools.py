"""gen_samples, gen_videos and export_mesh from the outside: their examples, files, flags, and one line for every mistake."""

import json
import shlex
import subprocess
import sys

import imageio_ffmpeg
import mrcfile
import numpy as np
import PIL.Image
import pytest
import trimesh
from click.testing import CliRunner

from tests.tools.examples import example_of
from tools import export_mesh, gen_samples, gen_videos

FLAGS = {
    gen_samples: """--class --cutoff --device --dry-run --fov-deg --network --noise-mode --outdir --psi --reload_modules --seeds
        --shape-border --shape-format --shape-level --shape-res --shapes --trunc --trunc-cutoff -n""",
    gen_videos: """--bitrate --cfg --cutoff --device --dry-run --fps --grid --image-mode --image_mode --interpolate --network --noise-mode
        --nrr --num-keyframes --outdir --psi --reload_modules --sample-mult --sample_mult --seeds --shape-format --shape-res --shapes
        --shuffle-seed --trunc --trunc-cutoff --w-frames -n""",
    export_mesh: """--border --colors --component --cutoff --device --dry-run --faces --level --network --no-colors --noise-mode --out
        --psi --resolution --seed --shape-res --trunc --trunc-cutoff -n""",
}


def run(tool, *flags):
    return CliRunner().invoke(tool.main, [str(flag) for flag in flags])


def smaller(tool, tmp_path, **changes) -> list[str]:
    """The example's command line, run in a temporary folder with smaller sizes."""
    python, script, *flags = shlex.split(example_of(tool.main))
    assert python == "python" and script == f"tools/{tool.__name__.split('.')[-1]}.py"
    given = dict(flag.split("=", 1) for flag in flags)
    assert set(changes) <= set(given)  # only values of the example's own flags are changed
    return [sys.executable, script, *(f"{name}={value}" for name, value in {**given, **changes}.items())]


def execute(command, repo):
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # a progress bar
    return done


@pytest.mark.parametrize("tool", FLAGS)
def test_flags_are_frozen(tool):
    assert sorted(name for p in tool.main.params for name in p.opts + p.secondary_opts) == sorted(FLAGS[tool].split())


def test_the_example_of_gen_samples(repo, tmp_path):
    execute(smaller(gen_samples, tmp_path, **{"--outdir": str(tmp_path)}), repo)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"seed{s:04d}.png" for s in (0, 2, 3, 4, 5)]
    with PIL.Image.open(tmp_path / "seed0002.png") as picture:
        assert picture.size == (3 * 64, 64)
    again = tmp_path / "again"
    assert run(gen_samples, "--seeds=2", "--trunc=0.7", f"--outdir={again}").exit_code == 0
    assert (again / "seed0002.png").read_bytes() == (tmp_path / "seed0002.png").read_bytes()


@pytest.mark.long
def test_the_example_of_gen_videos(repo, tmp_path):
    done = execute(smaller(gen_videos, tmp_path, **{"--outdir": str(tmp_path), "--w-frames": "4"}), repo)
    assert "4 frames" in done.stdout
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "interpolation.mp4"))
    assert next(reader)["size"] == (128, 128)
    assert len(list(reader)) == 4


def test_the_example_of_export_mesh(repo, tmp_path):
    out = tmp_path / "head.glb"
    execute(smaller(export_mesh, tmp_path, **{"--out": str(out), "--resolution": "64"}), repo)
    report = json.loads((tmp_path / "head.glb.json").read_text())
    mesh = trimesh.load(out, force="mesh")
    assert mesh.is_watertight and mesh.is_winding_consistent and report["watertight"] and report["outward"]
    assert len(mesh.faces) == report["faces"] and report["components"] == 1
    assert mesh.volume == pytest.approx(report["volume"], rel=1e-3) and mesh.volume > 0
    assert report["normals_down_density"] > 0.98
    assert report["options"]["resolution"] == 64 and report["seed"] == 1


@pytest.mark.parametrize("suffix", [".ply", "obj", ".glb"])
def test_shapes_of_gen_samples(suffix, tmp_path):
    flags = ["--seeds=1", "--shapes=1", "--shape-res=48", f"--shape-format={suffix}", f"--outdir={tmp_path}"]
    assert run(gen_samples, *flags).exit_code == 0
    mesh = trimesh.load(tmp_path / f"seed0001.{suffix.lstrip('.')}", force="mesh")
    assert mesh.is_watertight and mesh.volume > 0
    edge = 0.5 - int(30 / 256 * 48) / 47  # the cleared border, world units
    assert np.abs(mesh.bounds).max() < edge + 1 / 47


def test_density_of_gen_samples(tmp_path):
    assert run(gen_samples, "--seeds=1", "--shapes=True", "--shape-res=32", f"--outdir={tmp_path}").exit_code == 0
    with mrcfile.open(tmp_path / "seed0001.mrc") as file:
        assert file.data.shape == (32, 32, 32)
        assert (file.data[:3] == -1000).all() and (file.data[:, -3:] == -1000).all() and file.data.max() > 10


def test_films_of_single_seeds_with_shapes(tmp_path):
    flags = ["--seeds=3,5", "--interpolate=False", "--w-frames=2", "--image_mode=image_raw", "--nrr=10", "--cfg=shapenet", "--shapes=1",
             "--shape-res=16", f"--outdir={tmp_path}", "--sample_mult=0.5"]
    result = run(gen_videos, *flags)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.mp4", "3_shapes", "5.mp4", "5_shapes"]
    assert sorted(p.name for p in (tmp_path / "3_shapes").iterdir()) == ["0000_shape.mrc", "0001_shape.mrc"]
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "5.mp4"))
    assert next(reader)["size"] == (10, 10)
    assert len(list(reader)) == 2


def test_decimation_colours_and_parts(tmp_path):
    out = tmp_path / "a.ply"
    result = run(export_mesh, "--seed=2", "--resolution=48", "--faces=800", "--no-colors", "--component=all", f"--out={out}")
    assert result.exit_code == 0, result.output
    report, mesh = json.loads(out.with_name("a.ply.json").read_text()), trimesh.load(out)
    assert 700 <= report["faces"] <= 1300 and len(mesh.faces) == report["faces"] < report["faces_extracted"]
    assert mesh.is_watertight and mesh.visual.kind != "vertex"


def test_a_mesh_that_is_not_watertight_ends_with_1(tmp_path, monkeypatch):
    def torn(field, options, progress):
        mesh, _ = real(field, options, progress)
        object.__setattr__(mesh, "faces", mesh.faces[1:])
        from eg3d_rlhf.geometry.mesh_export import check_mesh

        return mesh, check_mesh(mesh, field, options, len(mesh.faces), 1)

    real = export_mesh.export_mesh
    monkeypatch.setattr(export_mesh, "export_mesh", torn)
    result = run(export_mesh, "--resolution=32", f"--out={tmp_path / 'a.ply'}")
    assert result.exit_code == 1 and "NOT watertight (3 open, 0 shared half-edges)" in result.stdout
    assert not json.loads((tmp_path / "a.ply.json").read_text())["watertight"]


@pytest.mark.parametrize("tool", FLAGS)
def test_dry_runs_print_json_and_write_nothing(tool, tmp_path):
    target = ["--out", tmp_path / "x" / "a.ply"] if tool is export_mesh else ["--seeds=0-3", "--outdir", tmp_path / "x"]
    result = run(tool, "-n", *target)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["network"] == "bundled"
    assert list(tmp_path.iterdir()) == []


def test_options_without_effect_warn(tmp_path):
    result = run(gen_samples, "-n", "--seeds=0", "--class=3", "--reload_modules=1", f"--outdir={tmp_path}")
    assert "--class has no effect" in result.stderr and "--reload_modules has no effect" in result.stderr
    assert "--reload_modules has no effect" in run(gen_videos, "-n", "--seeds=0", "--reload_modules=1", f"--outdir={tmp_path}").stderr


MISTAKES = {
    "seeds": (gen_samples, ["--seeds=5-2", "--outdir={tmp}"], "--seeds: seeds: expected ranges that rise"),
    "format": (gen_samples, ["--seeds=1", "--shape-format=.stl", "--outdir={tmp}"], "--shape-format: expected a shape format of .ply"),
    "network": (gen_samples, ["--seeds=1", "--network={tmp}/no.safetensors", "--outdir={tmp}"], "--network: "),
    "level": (gen_samples, ["--seeds=1", "--shapes=1", "--shape-res=16", "--shape-format=ply", "--shape-level=1e9", "--outdir={tmp}"],
              "both sides of level 1e+09"),
    "grid": (gen_videos, ["--seeds=1", "--grid=2", "--outdir={tmp}"], "--grid: expected WxH such as 4x3, got '2'"),
    "cells": (gen_videos, ["--seeds=1-3", "--grid=2x2", "--outdir={tmp}"], "expected a multiple of 4 seeds"),
    "video network": (gen_videos, ["--seeds=1", "--network={tmp}", "--outdir={tmp}"], "--network: network: expected a network-snapshot"),
    "suffix": (export_mesh, ["--out={tmp}/a.stl"], "--out: export_mesh: expected a file ending in .ply, .obj, .glb, got 'a.stl'"),
    "surface": (export_mesh, ["--out={tmp}/a.ply", "--resolution=16", "--level=-1e9"], "both sides of level -1e+09"),
    "not finite": (export_mesh, ["--out={tmp}/a.ply", "--level=nan"], "expected a finite level, got nan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, tmp_path):
    tool, flags, text = MISTAKES[name]
    result = run(tool, *(flag.format(tmp=tmp_path) for flag in flags))
    assert result.exit_code == 2, (result.exit_code, result.exception)
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("Error:")]
    assert len(lines) == 1 and text in lines[0]
    assert result.stderr.rstrip().endswith(lines[0])
    assert list(tmp_path.glob("*.ply")) == []


def test_a_field_above_the_level_everywhere_names_levels_that_do(tmp_path):
    flags = ["--resolution=24", "--border=0.3", "--no-colors", "--component=all", f"--out={tmp_path / 'a.ply'}"]
    result = run(export_mesh, "--level=-500", *flags)
    assert result.exit_code == 2
    message = result.stderr.rstrip().splitlines()[-1]
    assert "on both sides of level -500, got [" in message and "-1000" not in message
    level = message.rsplit(" ", 1)[1].rstrip(".")
    assert run(export_mesh, f"--level={level}", *flags).exit_code == 0


def test_eg3ds_own_field_of_view_is_accepted(tmp_path):
    """Its default is the whole number 18."""
    shown = [json.loads(run(gen_samples, "-n", "--seeds=0", f"--outdir={tmp_path}", *flags).stdout)["fov_deg"]
             for flags in ([], ["--fov-deg=18"])]
    assert shown == [18.837, 18]
    for folder, flags in (("ours", []), ("theirs", ["--fov-deg=18"])):
        assert run(gen_samples, "--seeds=1", f"--outdir={tmp_path / folder}", *flags).exit_code == 0
    ours, theirs = (np.asarray(PIL.Image.open(tmp_path / name / "seed0001.png")).astype(int) for name in ("ours", "theirs"))
    assert 0 < np.abs(ours - theirs).max()
