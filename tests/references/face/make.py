"""Write the values of this folder: outputs of LiteRT for the networks of faces.

The networks are those of the wheels that `builders/face.py` names. LiteRT is the package ai-edge-litert
(2.3.0). With the wheels in the folder WHEELS:

    PYTHONPATH=. python tests/references/face/make.py WHEELS

The tests import `inputs` and `run_litert`, so that both sides have the same inputs.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
EDGES = {"detector": 128, "mesh": 192}  # pixels of the inputs
RANGES = {"detector": (-1.0, 1.0), "mesh": (0.0, 1.0)}
CASES = {"noise": 1, "squares": 2, "head": 0}  # kind of image -> seed
KEPT = 1500  # values of an output, at equal steps


def inputs(network: str, kind: str, seed: int, head: np.ndarray) -> np.ndarray:
    """Return one input [H, W, 3] float32: independent pixels, squares of colour, or an image of a head."""
    edge = EDGES[network]
    low, high = RANGES[network]
    random = np.random.default_rng(seed)
    if kind == "noise":
        pixels = random.random((edge, edge, 3))
    elif kind == "squares":
        pixels = random.random((8, 8, 3)).repeat(edge // 8, axis=0).repeat(edge // 8, axis=1)
    else:
        pixels = head / 255
    return (low + pixels * (high - low)).astype(np.float32)


def thinned(values: np.ndarray) -> np.ndarray:
    """Return at most KEPT values of an array, at equal steps."""
    flat = np.asarray(values, np.float32).reshape(-1)
    return flat[:: -(-flat.size // KEPT)]


def run_litert(path: Path, image: np.ndarray) -> list[np.ndarray]:
    """Return all outputs of a TensorFlow Lite file for one image [H, W, 3]."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
    interpreter.invoke()
    return [interpreter.get_tensor(output["index"])[0] for output in interpreter.get_output_details()]


def head_crops() -> dict[str, np.ndarray]:
    """Return the crops of a rendered head that the finder gives to the networks, uint8, by network."""
    from eg3d_rlhf.models.face.finder import Pyramid, Square
    from tests.models.heads_in_images import render

    pyramid = Pyramid(render(0, 20.0))
    square = Square(np.array([130.0, 150.0]), 190.0, 0.05)
    return {network: pyramid.crop(square, edge) for network, edge in EDGES.items()}


def main(wheels: Path) -> None:
    from builders.face import SOURCES, read_source

    arrays = {}
    for network, crop in head_crops().items():
        arrays[f"{network}/head"] = crop
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.tflite")
            path.write_bytes(read_source(SOURCES[network], wheels))
            for kind, seed in CASES.items():
                outputs = run_litert(path, inputs(network, kind, seed, crop))
                for index, output in enumerate(outputs):
                    arrays[f"{network}/{kind}/{index}"] = thinned(output)
    np.savez_compressed(FOLDER / "networks.npz", **arrays)
    recipe = {"cases": CASES, "sha256": {network: SOURCES[network].sha256 for network in EDGES}}
    (FOLDER / "networks.json").write_text(json.dumps(recipe, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
