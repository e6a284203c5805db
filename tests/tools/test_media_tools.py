"""Images, videos and meshes of a generator on the command line: examples, files, flags, error messages."""

import json
import re

import imageio_ffmpeg
import mrcfile
import numpy as np
import PIL.Image
import pytest
import trimesh
from click.testing import CliRunner

from eg3d_rlhf.geometry import mesh_export
from eg3d_rlhf.modes import samples
from tests.rejections import check_message
from tests.tools.examples import flags_of

EG3DS = {  # flags of EG3D's scripts of the same names
    samples.images: (
        "--network --seeds --trunc --trunc-cutoff --outdir --shapes --shape-res --fov-deg --shape-format"
    ),
    samples.videos: (
        "--network --seeds --shuffle-seed --grid --num-keyframes --w-frames --trunc --trunc-cutoff --outdir"
        " --cfg --image_mode --sample_mult --nrr --shapes --interpolate"
    ),
}


def run(tool, *flags):
    return CliRunner().invoke(tool, [str(flag) for flag in flags])


def smaller(tool, **changes) -> list[str]:
    """The example's flags with smaller sizes."""
    example = dict(word.split("=", 1) for word in flags_of(tool))
    assert set(changes) <= set(example)  # only values of the example's own flags are changed
    return [f"{name}={value}" for name, value in {**example, **changes}.items()]


def execute(tool, **changes):
    result = run(tool, *smaller(tool, **changes))
    assert result.exit_code == 0, result.output
    assert "00:" in result.stderr  # what a bar leaves in a log: the time that it took
    return result


@pytest.mark.parametrize("tool", EG3DS)
def test_eg3ds_flags_are_known(tool):
    assert set(EG3DS[tool].split()) <= {name for p in (*tool.params, *tool.rare.values()) for name in p.opts}


def test_the_example_of_gen_samples(tmp_path):
    execute(samples.images, **{"--outdir": str(tmp_path)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"seed{s:04d}.png" for s in (0, 2, 3, 4, 5)]
    with PIL.Image.open(tmp_path / "seed0002.png") as image:
        assert image.size == (3 * 64, 64)
    again = tmp_path / "again"
    assert run(samples.images, "--seeds=2", "--trunc=0.7", f"--outdir={again}").exit_code == 0
    assert (again / "seed0002.png").read_bytes() == (tmp_path / "seed0002.png").read_bytes()


@pytest.mark.long
def test_the_example_of_gen_videos(tmp_path):
    done = execute(samples.videos, **{"--outdir": str(tmp_path), "--w-frames": "4"})
    assert "4 frames" in done.stdout
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "interpolation.mp4"))
    assert next(reader)["size"] == (128, 128)
    assert len(list(reader)) == 4


def test_the_example_of_export_mesh(tmp_path):
    out = tmp_path / "head.glb"
    execute(samples.mesh, **{"--out": str(out), "--resolution": "64"})
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
    assert run(samples.images, *flags).exit_code == 0
    mesh = trimesh.load(tmp_path / f"seed0001.{suffix.lstrip('.')}", force="mesh")
    assert mesh.is_watertight and mesh.volume > 0
    edge = 0.5 - int(30 / 256 * 48) / 47  # the cleared border, world units
    assert np.abs(mesh.bounds).max() < edge + 1 / 47


def test_density_of_gen_samples(tmp_path):
    assert (
        run(samples.images, "--seeds=1", "--shapes=True", "--shape-res=32", f"--outdir={tmp_path}").exit_code
        == 0
    )
    with mrcfile.open(tmp_path / "seed0001.mrc") as file:
        assert file.data.shape == (32, 32, 32)
        assert (file.data[:3] == -1000).all() and (file.data[:, -3:] == -1000).all() and file.data.max() > 10


def test_films_of_single_seeds_with_shapes(tmp_path):
    flags = [
        "--seeds=3,5",
        "--interpolate=False",
        "--w-frames=2",
        "--image_mode=image_raw",
        "--set=nrr=10",
        "--cfg=shapenet",
        "--shapes=1",
        "--set=shape_res=16",
        f"--outdir={tmp_path}",
        "--set=sample_mult=0.5",
    ]
    result = run(samples.videos, *flags)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.mp4", "3_shapes", "5.mp4", "5_shapes"]
    assert sorted(p.name for p in (tmp_path / "3_shapes").iterdir()) == ["0000_shape.mrc", "0001_shape.mrc"]
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "5.mp4"))
    assert next(reader)["size"] == (10, 10)
    assert len(list(reader)) == 2


def test_decimation_colours_and_parts(tmp_path):
    out = tmp_path / "a.ply"
    result = run(
        samples.mesh,
        "--seed=1",
        "--resolution=48",
        "--faces=800",
        "--set=colors=false",
        "--set=component=all",
        f"--out={out}",
    )
    assert result.exit_code == 0, result.output
    report = json.loads(out.with_name("a.ply.json").read_text())
    mesh = trimesh.load(out)
    assert 700 <= report["faces"] <= 1300 and len(mesh.faces) == report["faces"] < report["faces_extracted"]
    assert mesh.is_watertight and mesh.visual.kind != "vertex"


def test_a_mesh_that_is_not_watertight_ends_with_1(tmp_path, monkeypatch):
    def torn(field, options, progress):
        mesh, _ = real(field, options, progress)
        object.__setattr__(mesh, "faces", mesh.faces[1:])
        return mesh, mesh_export.check_mesh(mesh, field, options, len(mesh.faces), 1)

    real = mesh_export.export_mesh
    monkeypatch.setattr(mesh_export, "export_mesh", torn)
    result = run(samples.mesh, "--resolution=32", f"--out={tmp_path / 'a.ply'}")
    assert result.exit_code == 1 and re.search(r"\b3 open\b.*\b0 shared\b", result.stdout)
    assert not json.loads((tmp_path / "a.ply.json").read_text())["watertight"]


MISTAKES = {
    "seeds": (samples.images, ["--seeds=5-2", "--outdir={tmp}"], "seeds: "),
    "format": (samples.images, ["--seeds=1", "--shape-format=.stl", "--outdir={tmp}"], "--shape-format: "),
    "network": (
        samples.images,
        ["--seeds=1", "--network={tmp}/no.safetensors", "--outdir={tmp}"],
        "--network: ",
    ),
    "level": (
        samples.images,
        "--seeds=1 --shapes=1 --shape-res=16 --shape-format=ply --set=level=1e9 --outdir={tmp}".split(),
        "1e+09",
    ),
    "grid": (samples.videos, ["--seeds=1", "--grid=2", "--outdir={tmp}"], "--grid: "),
    "cells": (samples.videos, ["--seeds=1-3", "--grid=2x2", "--outdir={tmp}"], "--seeds: "),
    "video network": (samples.videos, ["--seeds=1", "--network={tmp}", "--outdir={tmp}"], "--network: "),
    "suffix": (samples.mesh, ["--out={tmp}/a.stl"], "--out: "),
    "surface": (samples.mesh, ["--out={tmp}/a.ply", "--resolution=16", "--set=level=-1e9"], "-1e+09"),
    "not finite": (samples.mesh, ["--out={tmp}/a.ply", "--set=level=nan"], "nan"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, tmp_path):
    tool, flags, text = MISTAKES[name]
    result = run(tool, *(flag.format(tmp=tmp_path) for flag in flags))
    assert result.exit_code == 2, (result.exit_code, result.exception)
    errors = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and result.stderr.rstrip().endswith(errors[0])
    check_message(errors[0], (text,))
    assert list(tmp_path.glob("*.ply")) == []


@pytest.mark.parametrize("tool", [samples.images, samples.videos, samples.mesh])
def test_dry_runs_print_json_and_write_nothing(tool, tmp_path):
    target = (
        ["--out", tmp_path / "x" / "a.ply"]
        if tool is samples.mesh
        else ["--seeds=0-3", "--outdir", tmp_path / "x"]
    )
    result = run(tool, "-n", *target)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["network"] == "bundled"
    assert list(tmp_path.iterdir()) == []
