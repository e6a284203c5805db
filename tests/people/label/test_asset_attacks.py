"""Hostile assets are rejected with the file's name and the reason: nothing is fetched, nothing is allocated
by a claim, no traceback.
"""

import gzip
import json
import os
import socket
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eg3d_rlhf.geometry.files import glb, model, obj, ply
from eg3d_rlhf.geometry.files.model import glb_parts
from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.assets.collection import read_collection
from tests.people.label import asset_files as files
from tests.rejections import check_message, raising


def changed(**parts) -> bytes:
    """A GLB whose parts are replaced; a callable is given the old one."""
    document, binary = files.glb_document()
    for name, value in parts.items():
        document[name] = value(document[name]) if callable(value) else value
    return files.pack_glb(document, binary)


def first(**fields):
    """Changes the first of a list of records."""
    return lambda records: [{**records[0], **fields}, *records[1:]]


def png_of(width: int, height: int) -> bytes:
    """A PNG that states a size and holds few bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return model.PNG + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bomb_of_pixels() -> bytes:
    document, binary = files.glb_document()
    document["bufferViews"].append(
        {"buffer": 0, "byteOffset": len(binary), "byteLength": len(png_of(60_000, 60_000))}
    )
    document["images"][0]["bufferView"] = 4
    return files.pack_glb(document, binary + png_of(60_000, 60_000))


def many_textures() -> bytes:
    document, binary = files.glb_document()
    document["bufferViews"].append(
        {"buffer": 0, "byteOffset": len(binary), "byteLength": len(png_of(8192, 8192))}
    )
    document["images"] = [{"bufferView": 4, "mimeType": "image/png"}] * 4
    document["textures"] = [{"source": i} for i in range(4)]
    names = ("normalTexture", "occlusionTexture", "emissiveTexture")
    document["materials"][0] |= {name: {"index": i + 1} for i, name in enumerate(names)}
    return files.pack_glb(document, binary + png_of(8192, 8192))


def deep() -> bytes:
    text = b'{"asset": {"version": "2.0"}, "extras": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    return struct.pack("<4sII", b"glTF", 2, 20 + len(text)) + struct.pack("<II", len(text), 0x4E4F534A) + text


GLBS = {
    "points": (changed(accessors=first(count=10**12)), ("1,000,000,000,000 x 3",)),
    "many-arrays": (changed(accessors=first(count=2**40 - 1, bufferView=None)), ("1,099,511,627,775 x 3",)),
    "zeros": (
        changed(accessors=lambda a: [{"componentType": 5126, "count": 10**8, "type": "VEC3"}, *a[1:]]),
        ("100,000,000 x 3",),
    ),
    "beyond": (changed(accessors=first(byteOffset=10**6)), ("200 x 3", "2,400")),
    "view": (changed(bufferViews=first(byteLength=10**9)), ("8424", "1000000000")),
    "stride": (changed(bufferViews=first(byteStride=4)), ("200 x 3", "2,400")),
    "negative": (changed(accessors=first(byteOffset=-4)), ("byteOffset", "-4")),
    "fraction": (changed(accessors=first(count=1.5)), ("count", "1.5")),
    "buffer": (
        changed(buffers=[{"byteLength": 4, "uri": "http://127.0.0.1:9/x.bin"}]),
        ("data", "GLB"),
    ),
    "cycle": (changed(nodes=[{"children": [1]}, {"children": [0], "mesh": 0}]), ("nodes", "20,000")),
    "self": (changed(nodes=[{"children": [0], "mesh": 0}]), ("nodes", "20,000")),
    "nodes": (
        changed(nodes=[{"children": list(range(1, 30_000))}, *[{"mesh": 0}] * 30_000]),
        ("nodes", "20,000"),
    ),
    "instances": (
        changed(
            nodes=[{"children": list(range(1, 19_990))}, *[{"mesh": 0}] * 20_000],
            meshes=lambda m: [{"primitives": m[0]["primitives"] * 20}],
        ),
        ("20,000,000", "136,724,760"),
    ),
    "deep": (deep(), ("JSON", "GLB")),
    "nan": (changed(nodes=lambda n: [n[0], {**n[1], "translation": [float("nan"), 0, 0]}]), ("nan",)),
    "index": (
        changed(accessors=lambda a: [{**a[0], "count": 10}, {**a[1], "count": 10}, a[2]]),
        ("indices", "10"),
    ),
    "chain": (
        changed(
            nodes=[*({"children": [i + 1]} for i in range(15_000)), {"mesh": 0}], scenes=[{"nodes": [0]}]
        ),
        ("nodes", "500"),
    ),
    "draco": (
        changed(extensionsRequired=["KHR_draco_mesh_compression"]),
        ("KHR_draco_mesh_compression",),
    ),
    "skin": (changed(nodes=lambda n: [n[0], {**n[1], "skin": 0}]), ("skin",)),
    "lines": (
        changed(meshes=lambda m: [{"primitives": [{**m[0]["primitives"][0], "mode": 1}]}]),
        ("triangles", "lines"),
    ),
    "empty": (changed(scenes=[{"nodes": []}]), ("triangles", "GLB")),
    "list": (changed(nodes="x"), ("nodes",)),
    "null": (changed(accessors=None), ("glTF 2.0", "TypeError")),
    "words": (changed(meshes=[{"primitives": "abc"}]), ("glTF 2.0", "AttributeError")),
}


TEXTURES = {  # GLB files without one of their textures, with texts in the note
    "image": (changed(images=[{"uri": "http://127.0.0.1:9/x.png"}]), ("textures", "base64")),
    "passwd": (changed(images=[{"uri": "../../../etc/passwd"}]), ("textures", "base64")),
    "svg": (
        changed(images=[{"uri": "data:image/svg+xml;base64,PHN2Zz48c2NyaXB0Lz48L3N2Zz4="}]),
        ("PNG", "JPEG", "WebP"),
    ),
    "pixels": (bomb_of_pixels(), ("64", "60000 x 60000")),
    "textures": (many_textures(), ("base colour",)),
    "index": (changed(textures=[{"source": 7}]), ("images", "7")),
    "words": (changed(textures=[{"source": 0, "extensions": 3}]), ("glTF 2.0",)),
    "ktx2": (
        changed(
            textures=[{"extensions": {"KHR_texture_basisu": {"source": 0}}}],
            extensionsRequired=["KHR_texture_basisu"],
        ),
        ("KHR_texture_basisu", "PNG"),
    ),
}


def ply_of(
    vertices: int | str, faces: int = 0, body: bytes = b"", order: str = "binary_little_endian"
) -> bytes:
    head = (
        f"ply\nformat {order} 1.0\nelement vertex {vertices}\nproperty float x\nproperty float y\nproperty"
        " float z\n"
    )
    return f"{head}element face {faces}\nproperty list uchar int vertex_indices\nend_header\n".encode() + body


PLYS = {
    "points": (ply_of(10**12, 10**12), ("1000000000000", "'vertex'", "193")),
    "faces": (ply_of(1, 10**12, bytes(12)), ("1000000000000", "'face'", "193")),
    "text": (ply_of(10**12, 1, b"0 0 0\n", "ascii"), ("1000000000000", "'vertex'", "172")),
    "negative": (ply_of(-5, 3), ("-5", "'vertex'", "170")),
    "huge": (ply_of("9" * 4000), ("9" * 20, "'vertex'", "4,168")),
    "word": (ply_of("many"), ("PLY", "header")),
    "header": (b"ply\nformat ascii 1.0\n" + b"comment x\n" * 10_000, ("PLY", "header")),
    "cloud": (ply_of(2, 0, bytes(24)), ("mesh", "splats", "points")),
    "index": (
        ply_of(3, 1, bytes(36) + b"\3" + np.array([0, 1, 7], "<i4").tobytes()),
        ("indices", "3", "0..7"),
    ),
    "nan": (
        ply_of(3, 1, np.full(9, np.nan, "<f4").tobytes() + b"\3" + np.array([0, 1, 2], "<i4").tobytes()),
        ("positions",),
    ),
    "splats": (files.splats(10)[:-4], ("10", "'vertex'", "1,112")),
    "degree": (files.splats(10, 1).replace(b"f_rest_8", b"f_rest_9"), ("splats", "9 f_rest_")),
}


def fails_in_little_memory(read, data: bytes, names: tuple[str, ...], megabytes: float = 4) -> None:
    """`read` rejects the data with a short line that holds all of `names`, in little memory beyond some forty
    times the data, as JSON takes.
    """
    tracemalloc.start()
    try:
        with raising(*names) as caught:
            read(memoryview(data))
        assert len(str(caught.value)) < 500
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6 + 40 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", GLBS)
def test_a_hostile_glb_is_rejected(name):
    fails_in_little_memory(lambda data: glb_parts(glb.read_glb(data)), *GLBS[name])


@pytest.mark.parametrize("name", TEXTURES)
def test_a_glb_is_shown_without_a_hostile_texture(name):
    data, texts = TEXTURES[name]
    tracemalloc.start()
    try:
        shown = glb.read_glb(memoryview(data))
        assert tracemalloc.get_traced_memory()[1] < 4e6 + 40 * len(data)
    finally:
        tracemalloc.stop()
    check_message(shown.notes[0].text, texts)
    assert {note.kind for note in shown.notes} == {"untextured"}
    sent = b"".join(glb_parts(shown))
    document, _ = files.unpack_glb(sent)
    assert "images" not in document and document["asset"]["extras"] == {"notes": ["untextured"]}
    colour = document["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"]
    assert colour[0] == colour[1] == colour[2] < 0.6
    assert not any(text.encode() in sent for text in ("127.0.0.1", "passwd", "KHR_texture_basisu"))


def read_ply(data: memoryview) -> list:
    return (
        ply.splat_parts(ply.read_splats(data))
        if ply.read_header(data).splats
        else glb_parts(ply.read_mesh(data))
    )


@pytest.mark.parametrize("name", PLYS)
def test_a_hostile_ply_is_rejected(name):
    fails_in_little_memory(read_ply, *PLYS[name], megabytes=30)  # trimesh's import, where it is the first


@pytest.mark.parametrize(
    ("library", "names"),
    [
        ("map_Kd /etc/passwd", ("a.mtl", "'/etc/passwd'")),
        ("map_Kd http://127.0.0.1:9/x.png", ("a.mtl", "'http://127.0.0.1:9/x.png'")),
        ("map_Kd file:///etc/passwd", ("a.mtl", "'file:///etc/passwd'")),
        ("map_Kd ../secret.png", ("a.mtl", "'../secret.png'", "inner")),
        ("map_Kd ..\\secret.png", ("a.mtl", "inner")),
        ("map_Kd ../inner/../../secret.png", ("a.mtl", "inner")),
        ("map_Kd C:\\x.png", ("a.mtl", r"'C:\\x.png'")),
        ("map_Kd gone.png", ("a.mtl", "'gone.png'")),
        ("map_Kd link.png", ("a.mtl", "'link.png'")),
        ("map_Kd LINK.png", ("a.mtl", "'LINK.png'")),
        ("map_Kd folder/secret.png", ("a.mtl", "'folder/secret.png'")),
        ("map_Kd " + "x" * 5000, ("a.mtl",)),
        ("map_Kd a\0b.png", ("a.mtl",)),
        ("map_Kd loop.png", ("a.mtl",)),
        ("map_Kd pipe.png", ("a.mtl",)),
        ("map_Kd -s 2 2 2 a.png", ("a.mtl", "map_Kd", "'-s 2 2 2 a.png'")),
        ("Kd red", ("a.mtl", "Kd", "'red'")),
        ("map_Kd a.mtl", ("PNG", "JPEG", "WebP")),
        (None, ("a.obj", "'/etc/passwd'")),
    ],
)
def test_an_obj_is_shown_without_a_material_that_leads_elsewhere(tmp_path, library, names):
    (tmp_path / "inner").mkdir()
    path = files.write_obj(tmp_path / "inner" / "a.obj")
    (tmp_path / "secret.png").write_bytes(files.image_bytes())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(files.image_bytes())
    (tmp_path / "inner" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "inner" / "loop.png").symlink_to(tmp_path / "inner" / "loop.png")
    (tmp_path / "inner" / "folder").symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / "inner" / "pipe.png")
    for folder in ("http:/127.0.0.1:9", "C:"):  # as names of files, they would be there
        (tmp_path / "inner" / folder).mkdir(parents=True)
        (tmp_path / "inner" / folder / "x.png").write_bytes(files.image_bytes())
    if library is None:
        path.write_text(path.read_text().replace("mtllib a.mtl", "mtllib /etc/passwd"))
    else:
        path.with_suffix(".mtl").write_text(f"newmtl {files.SECRET}\n{library}\n")
    shown = obj.read_obj(path.read_bytes(), path)
    document, _ = files.unpack_glb(b"".join(glb_parts(shown)))
    assert "images" not in document
    check_message(shown.notes[0].text, names)
    assert len(shown.notes[0].text) < 500
    companions = obj.companion_files(path.read_bytes(), path)
    assert all(companion.is_relative_to(path.parent) for companion in companions)


@pytest.mark.long
def test_files_that_are_none_are_rejected_by_name(tmp_path):
    folder = tmp_path / "assets" / "a"
    folder.mkdir(parents=True)
    outside = tmp_path / "outside.glb"
    outside.write_bytes(files.glb())
    wrong = {
        "film.mp4": b"\0\0\0\x20ftypisom" + os.urandom(2000),
        "zip.glb": b"PK\3\4" + bytes(100),
        "packed.ply": gzip.compress(bytes(10**7)),
        "page.glb": b"<html><script>",
        "empty.obj": b"",
        "nothing.obj": b"# no triangle\nv 0 0 0\n",
        "list.mp4": b"#EXTM3U\nhttp://127.0.0.1:9/x",
        "points.ply": ply_of(10**12),
        "cyclic.glb": GLBS["cycle"][0],
    }
    for name, data in wrong.items():
        (folder / name).write_bytes(data)
        with raising(str(folder / name)):
            read_collection(tmp_path / "assets")
        (folder / name).unlink()
    (folder / "link.glb").symlink_to(outside)
    with raising("link.glb", "assets"):
        read_collection(tmp_path / "assets")


@pytest.mark.parametrize("suffix", [".pipe", ".loop"])
def test_what_is_no_file_at_all_is_rejected(tmp_path, suffix):
    path = tmp_path / f"a{suffix}.glb"
    if suffix == ".pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    with raising(str(path)):
        reading.examine([path])


def test_a_file_that_takes_too_much_is_rejected_and_the_others_are_still_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MEMORY", 150 << 20)
    monkeypatch.setattr(reading, "PER_BYTE", 0)
    fine = tmp_path / "fine.glb"
    large = tmp_path / "large.glb"
    fine.write_bytes(files.glb())
    large.write_bytes(b"glTF" + bytes(200 << 20))
    (result,) = reading.examine([fine])
    assert result.kind == "glb"
    with raising(str(large), "memory") as caught:
        reading.examine([large, fine])
    assert str(fine) not in str(caught.value)
    with raising("fine.glb", "memory"):
        monkeypatch.setattr(reading, "MEMORY", 20 << 20)
        reading.clean(fine, result.hash)


def test_a_film_fetches_nothing_and_opens_no_other_file(tmp_path):
    """A playlist or a script for ffmpeg behind a film's first bytes, and one without: neither is followed."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/x.mp4"
        other = files.write_film(tmp_path / "other.mp4")
        scripts = [
            f"#EXTM3U\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile '{address}'\nfile '{other}'\n",
        ]
        for text in (*scripts, *("\0\0\0\x10ftypisom\n\n\n\n" + script for script in scripts)):
            path = tmp_path / "a.mp4"
            out = tmp_path / "out.mp4"
            path.write_text(text)
            with raising("video"):
                reading.clean_video(path, out)
            assert not out.exists()
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize("text", ["\ud800", "a\x1b[31m", "a\x07"])
def test_a_prompt_that_no_answer_can_hold_is_rejected(tmp_path, text):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.glb").write_bytes(files.glb(seed=ord(name)))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "p", "text": text}) + "\n")
    with raising("prompts.jsonl, line 1", '"text"', repr(text)):
        read_collection(tmp_path)
    fine = "two lines\n\tand a family: \U0001f468\u200d\U0001f469"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "p", "text": fine}) + "\n")
    assert read_collection(tmp_path).prompts["p"].text == fine


@pytest.mark.parametrize("name", [b"a\xff", b"a\x1b[31m", b"a\nb"])
def test_a_generators_folder_whose_name_cannot_be_shown_is_rejected(tmp_path, name):
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    with open(os.path.join(folder, b"p.glb"), "wb") as file:
        file.write(files.glb())
    with raising(tmp_path.name, repr(os.fsdecode(name))):
        read_collection(tmp_path)


def test_an_obj_with_a_long_line_is_looked_at_quickly(tmp_path):
    began = time.process_time()
    assert obj.companion_files(b"mtllib x" + b" " * 30_000 + b"y\n", tmp_path / "a.obj") == []
    assert obj.companion_files(b"mtllib " + b"x" * 30_000 + b"\n", tmp_path / "a.obj") == []
    assert time.process_time() - began < 1


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.glb"
    out = tmp_path / "out"
    path.write_bytes(files.glb(seed=1))
    (known,) = reading.examine([path])
    pack = reading._pack

    def slow(*arguments):
        path.write_bytes(files.glb(seed=2))
        pack(*arguments)

    monkeypatch.setattr(reading, "_pack", slow)
    with raising(kind=reading.ChangedError):
        reading._clean(path, known.hash, "", 0, out)


def test_a_film_that_is_encoded_anew_does_not_tell_so(tmp_path):
    reading.clean_video(files.write_film(tmp_path / "a.mp4"), tmp_path / "copied.mp4")
    source = [
        "-f",
        "lavfi",
        "-i",
        "testsrc=size=64x64:rate=10:duration=1",
        "-c:v",
        "mpeg4",
        "-y",
        str(tmp_path / "b.mp4"),
    ]
    assert reading._ffmpeg(source, 30)[0] == 0
    reading.clean_video(tmp_path / "b.mp4", tmp_path / "encoded-anew.mp4")
    for name in ("copied.mp4", "encoded-anew.mp4"):
        assert [
            word for word in (b"x264", b"Lavc", b"Lavf") if word in (tmp_path / name).read_bytes()
        ] == [], name


def second_frame(kind: str) -> bytes:
    """An image of 16 x 16 behind a frame that states 16383 x 16383."""
    data = files.image_bytes(16, kind)
    if kind == "WEBP":
        at = data.index(b"VP8 ")
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        frame = data[at : at + 8 + length + length % 2]
        large = frame[:14] + struct.pack("<HH", 16383, 16383) + frame[18:]
        return b"RIFF" + struct.pack("<I", 4 + 2 * len(frame)) + b"WEBP" + large + frame
    at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    frame = bytearray(data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])
    frame[5:9] = struct.pack(">HH", 16383, 16383)
    return data[:at] + bytes(frame) + data[at:]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_an_image_that_states_two_sizes_is_rejected(kind):
    for read in (model.strip_image, model.preview_image):
        with raising({"WEBP": "WebP"}.get(kind, kind)):
            read(second_frame(kind))


SEEDS = {
    "glb": files.glb(60),
    "splats": files.splats(20, 1),
    "ply": files.ply(60),
    **{kind: files.image_bytes(16, kind) for kind in ("PNG", "JPEG", "WEBP")},
}
READERS = {
    "glb": lambda data: glb_parts(glb.read_glb(data)),
    "splats": read_ply,
    "ply": read_ply,
    **dict.fromkeys(("PNG", "JPEG", "WEBP"), model.strip_image),
}
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)


@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=150, deadline=None)
@given(cut=st.floats(0, 1), changes=CHANGES)
def test_damaged_files_are_read_or_rejected_and_nothing_else(kind, cut, changes):
    data = bytearray(SEEDS[kind])
    data = data[: max(1, round(cut * len(data)))] if cut < 0.7 else data
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    tracemalloc.start()
    try:
        READERS[kind](memoryview(bytes(data)))
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    finally:
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert used < 30e6


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@settings(max_examples=60, deadline=None)
@given(changes=CHANGES)
def test_damaged_images_of_prompts_are_shown_or_rejected(kind, changes):
    data = bytearray(SEEDS[kind])
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    try:
        assert model.image_format(model.preview_image(bytes(data))) == "image/webp"
    except ValueError as error:
        check_message(str(error), ())
