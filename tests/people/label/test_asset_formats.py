"""Vertices and pixels of assets are bitwise identical after cleaning, without any other content, in every
format.
"""

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from eg3d_rlhf.geometry.files import glb, model, obj, ply
from eg3d_rlhf.people.label.assets import reading
from tests.people.label import asset_files as files
from tests.rejections import raising
from training.image_reading import read_image

SECRET = files.SECRET.encode()


def written(shown: model.Model) -> bytes:
    return b"".join(model.glb_parts(shown))


def array(document: dict, binary: bytes, number: int) -> np.ndarray:
    """An accessor's numbers, read as the specification says."""
    accessor = document["accessors"][number]
    view = document["bufferViews"][accessor["bufferView"]]
    dtype = np.dtype(model.COMPONENTS[accessor["componentType"]])
    width = model.WIDTHS[accessor["type"]]
    stride = view.get("byteStride", dtype.itemsize * width)
    return np.ndarray((accessor["count"], width), dtype, binary, view["byteOffset"], (stride, dtype.itemsize))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_images_pixels_stay_and_its_notes_go(kind):
    before = files.image_bytes(40, kind)
    after, pixels = model.strip_image(before)
    assert SECRET in before and SECRET not in after.data and pixels == 1600
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(data))) for data in (before, after.data)))
    assert not dict(Image.open(io.BytesIO(after.data)).getexif())
    assert model.strip_image(before + b"hidden behind the end")[0] == after


def test_a_glb_keeps_every_bit_that_is_seen_and_no_name():
    before = files.glb(500, 32)
    document, binary = files.unpack_glb(before)
    after = written(glb.read_glb(memoryview(before)))
    clean, kept = files.unpack_glb(after)
    assert before.count(SECRET) > 10 and SECRET not in after
    for number in range(3):
        assert array(clean, kept, number).tobytes() == array(document, binary, number).tobytes()
    view = clean["bufferViews"][clean["images"][0]["bufferView"]]
    texture = kept[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
    assert np.array_equal(
        *(np.asarray(Image.open(io.BytesIO(data))) for data in (files.image_bytes(32), texture))
    )
    assert set(clean) <= {
        "asset",
        "scene",
        "scenes",
        "nodes",
        "meshes",
        "materials",
        "textures",
        "samplers",
        "images",
        "accessors",
        "bufferViews",
        "buffers",
    } and clean["asset"] == {"version": "2.0"}
    assert written(glb.read_glb(memoryview(after))) == after


def test_interleaved_quantised_and_sparse_arrays_are_read_as_meant():
    positions = np.arange(12, dtype="<i2").reshape(4, 3)
    mixed = np.zeros(4, [("p", "<i2", 3), ("", "<i2"), ("n", "i1", 3), ("", "i1")])
    mixed["p"], mixed["n"] = positions, np.arange(12).reshape(4, 3)
    places = np.array([1, 3], "<u2").tobytes()
    values = np.array([[7, 7, 7], [9, 9, 9]], "<i2").tobytes()
    binary = mixed.tobytes() + places + values
    sparse = {
        "count": 2,
        "indices": {"bufferView": 1, "componentType": 5123},
        "values": {"bufferView": 1, "byteOffset": 4},
    }
    short = {"componentType": 5122, "count": 4, "type": "VEC3", "bufferView": 0}
    document = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1}, "mode": 5}]}],
        "accessors": [
            {**short, "sparse": sparse},
            {**short, "componentType": 5120, "byteOffset": 8, "normalized": True},
        ],
        "bufferViews": [
            {"buffer": 0, "byteLength": 48, "byteStride": 12},
            {"buffer": 0, "byteOffset": 48, "byteLength": 16},
        ],
        "buffers": [{"byteLength": 64}],
        "extensionsRequired": ["KHR_mesh_quantization"],
    }
    clean, kept = files.unpack_glb(written(glb.read_glb(memoryview(files.pack_glb(document, binary)))))
    expected = positions.copy()
    expected[[1, 3]] = [[7] * 3, [9] * 3]
    assert np.array_equal(array(clean, kept, 0), expected) and np.array_equal(
        array(clean, kept, 1), mixed["n"]
    )
    assert clean["accessors"][0]["max"] == [9, 9, 9] and clean["accessors"][1]["normalized"]
    assert all(view["byteStride"] % 4 == 0 for view in clean["bufferViews"])
    assert clean["extensionsRequired"] == clean["extensionsUsed"] == ["KHR_mesh_quantization"]


@pytest.mark.parametrize("degree", [0, 3])
def test_splats_are_written_as_documented(degree):
    count = 101  # arrays of odd lengths
    rows = files.splat_columns(count, degree)
    data = files.splats(count, degree)
    sent = b"".join(ply.splat_parts(ply.read_splats(memoryview(data))))
    assert (
        sent[:4] == b"GSP1" and struct.unpack_from("<II", sent, 4) == (count, degree) and SECRET not in sent
    )
    at = 36
    values = {}
    arrays = [
        ("centres", "<f4", 3),
        ("scales", "<f2", 3),
        ("turns", "<i2", 4),
        ("opacity", "u1", 1),
        ("colours", "<f2", 3),
    ]
    for name, dtype, width in (*arrays, ("rest", "<f2", rows.shape[1] - 17)):
        values[name] = np.frombuffer(sent, dtype, count * width, at).reshape(count, width)
        at += -(-values[name].nbytes // 4) * 4
    assert at == len(sent)
    assert values["centres"].tobytes() == rows[:, :3].tobytes() and np.array_equal(
        values["colours"], rows[:, 6:9].astype("<f2")
    )
    assert np.array_equal(values["rest"], rows[:, 9:-8].astype("<f2")) and np.array_equal(
        values["scales"], rows[:, -7:-4].astype("<f2")
    )
    assert np.allclose(values["opacity"] / 255, 1 / (1 + np.exp(-rows[:, -8:-7])), atol=1 / 255)
    turns = rows[:, -4:] / np.linalg.norm(rows[:, -4:], axis=1, keepdims=True)
    assert np.abs(values["turns"] / 32767 - turns).max() < 1e-4
    least, extent = np.frombuffer(sent, "<f4", 6, 12).reshape(2, 3)
    assert np.allclose([least, least + extent], [rows[:, :3].min(0), rows[:, :3].max(0)])


def test_a_ply_mesh_keeps_positions_and_colours():
    positions, faces, uv = files.sphere(200, 0)
    data = files.ply(200)
    clean, kept = files.unpack_glb(written(ply.read_mesh(memoryview(data))))
    assert array(clean, kept, 0).tobytes() == positions.tobytes() and np.array_equal(
        array(clean, kept, 2).reshape(-1, 3), faces
    )
    shown = array(clean, kept, 1).astype(float)
    # as a screen shows it
    shown = np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055) * 255
    assert (
        np.abs(shown - np.stack([uv[:, 0] * 255, uv[:, 1] * 255, 0 * uv[:, 0]], 1).astype(np.uint8)).max()
        < 0.01
    )


def test_an_obj_brings_its_texture_along(tmp_path):
    positions, faces, uv = files.sphere(200, 0)
    path = files.write_obj(tmp_path / "chair.obj")
    after = written(obj.read_obj(memoryview(path.read_bytes()), path))
    clean, kept = files.unpack_glb(after)
    assert SECRET not in after and [p.name for p in obj.companion_files(path.read_bytes(), path)] == [
        "chair.mtl",
        "chair.png",
    ]
    at = array(clean, kept, 2)[:, 0]
    corners = array(clean, kept, 0)[at].reshape(-1, 3, 3), array(clean, kept, 1)[at].reshape(-1, 3, 2)
    assert np.array_equal(corners[0], positions[faces]) and np.allclose(corners[1], uv[faces], atol=1e-6)
    material = clean["materials"][0]["pbrMetallicRoughness"]
    assert material == {"metallicFactor": 0, "roughnessFactor": 1, "baseColorTexture": {"index": 0}}


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_film_keeps_its_frames_and_loses_its_notes(tmp_path, suffix):
    import imageio_ffmpeg

    before = files.write_film(tmp_path / f"a{suffix}")
    after = tmp_path / "clean.mp4"
    reading.clean_video(before, after)
    data = after.read_bytes()
    assert SECRET in before.read_bytes() and not any(
        word in data for word in (SECRET, b"x264", b"Lavf", b"Lavc")
    )
    assert data[4:8] == b"ftyp" and data.index(b"moov") < data.index(b"mdat")
    frames = [list(imageio_ffmpeg.read_frames(str(path)))[1:] for path in (before, after)]
    assert len(frames[0]) == 12 and frames[0] == frames[1]


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".avif", ".png", ".jpg", ".webp"])
def test_people_see_the_image_of_a_prompt_as_the_generator_does(tmp_path, suffix):
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste((200, 100, 50, 255), (10, 5, 30, 35))
    exif = Image.Exif()
    exif[0x0112] = 8
    path = tmp_path / f"prompt{suffix}"
    options = {} if suffix == ".gif" else {"exif": exif}
    (image.convert("RGB") if suffix == ".jpg" else image).save(path, **options)
    (examined,) = reading.examine([path])
    assert examined.kind == "image"
    with Image.open(io.BytesIO(reading.clean(path, examined.hash))) as shown:
        pixels = np.asarray(shown.convert("RGBA")).astype(int)
    generators_eyes = read_image(path, "x", background=None).convert("RGBA")
    assert generators_eyes.size == ((60, 40) if suffix == ".gif" else (40, 60))
    want = np.asarray(generators_eyes).astype(int)
    # WebP is lossy; colours of transparent pixels are not shown
    assert pixels.shape == want.shape and np.abs((pixels - want) * (want[..., 3:] > 0)).mean() < 3


def test_a_prompt_of_sixteen_bits_is_not_white(tmp_path):
    Image.fromarray(np.full((20, 20), 10000, np.uint16)).save(tmp_path / "grey.png")
    (examined,) = reading.examine([tmp_path / "grey.png"])
    with Image.open(io.BytesIO(reading.clean(tmp_path / "grey.png", examined.hash))) as shown:
        assert np.abs(np.asarray(shown.convert("L")).astype(int) - 39).max() <= 2


def test_images_that_cannot_be_shown_are_named_before_anyone_is_asked(tmp_path):
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (0, 200)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    (tmp_path / "photo.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(99))
    Image.effect_noise((64, 64), 90).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:-900])
    for name in ("moving.webp", "photo.heic", "half.png"):
        with raising(name):
            reading.examine([tmp_path / name])
