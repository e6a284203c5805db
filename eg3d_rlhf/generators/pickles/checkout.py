"""Export of networks as a genuine EG3D pickle, with the classes of the user's own checkout of EG3D.

EG3D's pickles contain objects of EG3D's classes, and their source text. This project has neither. So a child
process, whose import path holds the user's checkout alone, builds that checkout's classes with the
constructor arguments of our networks, copies the weights into them, and pickles them as EG3D's training does
(pickle_in_checkout.py). The child may use another Python interpreter. `eg3d_rlhf.generators.conversion.write`
reads the result again with the reader of this folder, which runs no code, and compares all tensors.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from eg3d_rlhf.core.input_paths import PICKLE_SUFFIX
from eg3d_rlhf.generators.state_dicts import settings_unknown_to_eg3d, stock_content
from training import networks

SUFFIX = PICKLE_SUFFIX
# Files that make a folder a checkout of EG3D, relative to its folder `eg3d`.
_NEEDED = ("training/triplane.py", "training/dual_discriminator.py", "torch_utils/persistence.py", "dnnlib")
_PROGRAM = Path(__file__).with_name("pickle_in_checkout.py")  # program of the child process
_G_CLASS = "training.triplane.TriPlaneGenerator"
_D_CLASS = "training.dual_discriminator.DualDiscriminator"
_AUGMENT_MODULE = "training.augment"


def find_code(checkout: Path) -> Path:
    """Return the folder of a checkout that holds EG3D's packages: the folder itself, or its subfolder `eg3d`.

    Raises: ValueError that names --eg3d if there is no such folder.
    """
    candidate_folders = (checkout, checkout / "eg3d")
    for folder in candidate_folders:
        if all((folder / needed).exists() for needed in _NEEDED):
            return folder.resolve()
    missing_files = [needed for needed in _NEEDED if not (candidate_folders[0] / needed).exists()]
    raise ValueError(
        f"--eg3d: {checkout} is no checkout of EG3D: {', '.join(missing_files)} are missing, also in its"
        " folder eg3d. Name the folder into which you cloned EG3D's repository."
    )


def check_networks(nets: networks.Networks) -> None:
    """Raise ValueError if EG3D's classes cannot hold these networks, or if G or D is missing."""
    unknown_settings = settings_unknown_to_eg3d(nets)
    if unknown_settings:
        raise ValueError(
            "--out: EG3D's classes cannot hold this generator, because they hard-code these sizes:"
            f" {', '.join(unknown_settings)}. Write --out=NAME.safetensors."
        )
    missing_names = [name for name in ("G", "D") if getattr(nets, name) is None]
    if missing_names:
        raise ValueError(
            f"--out: EG3D's tools open only pickles with G, D and G_ema, and this file has no"
            f" {' and no '.join(missing_names)}. Name a snapshot of a training run, or write --out=NAME.pt."
        )


def write(
    nets: networks.Networks, out_path: Path, checkout: Path, interpreter: Path | None = None
) -> dict[str, str]:
    """Write networks as an EG3D pickle.

    Args:
        nets: networks with G, D and G_ema of EG3D's family.
        out_path: path of the pickle.
        checkout: folder of the user's clone of EG3D, see `find_code`.
        interpreter: Python interpreter of the child process, which needs torch and what the checkout imports;
            None: the interpreter of this process.
    Returns: versions of 'torch' and 'python' of the child process.
    Raises: ValueError with the flag that has to change. No file is left in this case.
    """
    code_folder = find_code(checkout)
    check_networks(nets)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    # In the folder of the result, so that the finished pickle can be moved without a copy.
    with tempfile.TemporaryDirectory(prefix=f".{out_path.name}-", dir=out_path.parent) as temporary_folder:
        folder = Path(temporary_folder).resolve()
        request, arrays = _request(nets)
        (folder / "request.json").write_text(json.dumps(request))
        np.savez(folder / "weights.npz", **arrays)  # type: ignore[arg-type]
        versions = _run_child(folder, code_folder, interpreter)
        os.replace(folder / "network.pkl", out_path)
    return versions


def _request(nets: networks.Networks) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the request of the child process and its arrays by name, such as 'G/decoder.net.0.weight'."""
    content = stock_content(nets)
    arrays = {
        f"{name}/{tensor_name}": tensor.numpy()
        for name in ("G", "D", "G_ema")
        for tensor_name, tensor in content[name].items()
    }
    arrays["plane_axes"] = content["plane_axes"].numpy()
    generator_entry = {
        "class": _G_CLASS,
        "kwargs": content["G_kwargs"],
        "attributes": {"neural_rendering_resolution": content["neural_rendering_resolution"]},
        "tensor_attributes": {"renderer.plane_axes": "plane_axes"},
    }
    network_entries: dict[str, dict[str, Any]] = {
        "G": generator_entry,
        "G_ema": generator_entry,
        "D": {"class": _D_CLASS, "kwargs": content["D_kwargs"]},
    }
    augment = nets.training_set.get("augment")
    if augment is not None:
        # The other buffers of the augmentation are constants, which its constructor computes.
        network_entries["augment_pipe"] = {
            "class": f"{_AUGMENT_MODULE}.{augment['class_name']}",
            "kwargs": augment["options"],
            "partial": True,
        }
        arrays["augment_pipe/p"] = np.array(augment["p"], dtype=np.float32)
    training_set_kwargs = dict(nets.training_set.get("options") or {})
    return {"networks": network_entries, "training_set_kwargs": training_set_kwargs}, arrays


def _run_child(folder: Path, code_folder: Path, interpreter: Path | None) -> dict[str, str]:
    """Run pickle_in_checkout.py, and return the content of its result.

    Args: folder: folder of the request; code_folder, interpreter: see `write`.
    Raises: ValueError if the interpreter cannot be started, or if a step failed.
    """
    program = str(interpreter or sys.executable)
    # -E ignores PYTHONPATH, which could lead to this project's packages of the same names. -B writes no
    # compiled files into the user's checkout.
    command = [program, "-E", "-B", str(_PROGRAM), str(folder), str(code_folder)]
    try:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", cwd=folder
        )
    except OSError as error:
        raise ValueError(
            f"--eg3d-python: {program} cannot be started ({error.strerror}). Name the Python interpreter of"
            " the environment in which EG3D runs."
        ) from None
    try:
        result: dict[str, str] = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"--eg3d-python: {program} ended with status {process.returncode} before it wrote a pickle:"
            f" {last_line}. Name the Python interpreter of the environment in which EG3D runs."
        ) from None
    if "error" not in result:
        return result
    # Errors of torch may have many lines.
    reason = " ".join(result["error"].split())[:600].rstrip(".")
    remedies = {
        "import": (
            f"--eg3d-python: {program} cannot import the code in {code_folder}: {reason}. Name the Python"
            " interpreter of the environment in which this checkout runs."
        ),
        "build": (
            f"--eg3d: the classes in {code_folder} reject the constructor arguments of this network:"
            f" {reason}. Name a checkout of the original EG3D, or the version that the network was made with."
        ),
        "tensors": (
            f"--eg3d: the classes in {code_folder} have other tensors than this network: {reason}. Name a"
            " checkout of the original EG3D, or the version that the network was made with."
        ),
        "write": (
            f"--eg3d: the pickle cannot be written with the classes in {code_folder}: {reason}. Check that"
            " this checkout can write snapshots, and the space on the disk."
        ),
    }
    raise ValueError(remedies[result["step"]])
