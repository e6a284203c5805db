"""Program that writes an EG3D pickle with the classes of a user's own checkout of EG3D.

`checkout.py` starts this file as a child process, possibly with the Python interpreter of another
environment: `python pickle_in_checkout.py FOLDER CHECKOUT`. FOLDER holds request.json and weights.npz.
The program writes network.pkl and result.json into it.

This file imports nothing of this project, and it must run with old interpreters (Python 3.7, torch 1.8), so
it uses no newer syntax.
"""

import json
import os
import sys


def run(folder, checkout):
    """Build the networks that FOLDER/request.json describes, and write FOLDER/network.pkl.

    Args:
        folder: folder of the request.
        checkout: folder of the checkout that holds the packages dnnlib, torch_utils and training.
    Returns: the content of result.json. If it has the key "error", no pickle was written; "step" is then the
        step that failed: "import", "build", "tensors" or "write".
    """
    step = "import"
    try:
        # pickle writes the objects; the checkout's torch_utils.persistence decides what is written of them.
        import importlib
        import pickle

        import numpy
        import torch

        dnnlib = importlib.import_module("dnnlib")
        with open(os.path.join(folder, "request.json")) as request_file:
            request = json.load(request_file)
        classes = {}
        for class_path in sorted({entry["class"] for entry in request["networks"].values()}):
            module_name, _, class_name = class_path.rpartition(".")
            module = importlib.import_module(module_name)
            module_file = os.path.realpath(getattr(module, "__file__", None) or "")
            # A package of the same name could be installed in the interpreter's environment.
            if not module_file.startswith(os.path.realpath(checkout) + os.sep):
                raise ImportError(f"{module_name} was imported from {module_file}")
            classes[class_path] = getattr(module, class_name)
        arrays = numpy.load(os.path.join(folder, "weights.npz"), allow_pickle=False)

        def easy(value):
            """Convert nested dictionaries to the checkout's EasyDict, which genuine files contain."""
            if not isinstance(value, dict):
                return value
            return dnnlib.EasyDict((name, easy(entry)) for name, entry in value.items())

        content = {"training_set_kwargs": easy(request["training_set_kwargs"])}
        for name in ("G", "D", "G_ema", "augment_pipe"):
            content[name] = None
            if name not in request["networks"]:
                continue
            entry = request["networks"][name]
            step = "build"
            network = classes[entry["class"]](**easy(entry["kwargs"]))
            step = "tensors"
            state = {}
            for array_name in arrays.files:
                owner, _, tensor_name = array_name.partition("/")
                if owner == name:
                    state[tensor_name] = torch.from_numpy(numpy.array(arrays[array_name]))
            # EG3D's training adds this buffer to a finished network.
            if "dataset_label_std" in state:
                network.register_buffer("dataset_label_std", state["dataset_label_std"].clone())
            network.load_state_dict(state, strict=not entry.get("partial", False))
            for path, array_name in entry.get("tensor_attributes", {}).items():
                # Plane axes are an ordinary attribute of the renderer, not a buffer.
                owner_path, _, attribute = path.rpartition(".")
                owner = network
                for part in owner_path.split("."):
                    owner = getattr(owner, part)
                if not hasattr(owner, attribute):
                    raise AttributeError(f"{owner_path} has no {attribute}")
                setattr(owner, attribute, torch.from_numpy(numpy.array(arrays[array_name])))
            for attribute, value in entry.get("attributes", {}).items():
                setattr(network, attribute, value)
            # EG3D's training writes all modules in evaluation mode and without gradients.
            content[name] = network.eval().requires_grad_(False)
        step = "write"
        with open(os.path.join(folder, "network.pkl"), "wb") as pickle_file:
            pickle.dump(content, pickle_file)
        return {"torch": str(torch.__version__), "python": sys.version.split()[0]}
    # Code of the checkout may raise anything, and the parent process reports it as one line.
    except Exception as error:
        return {"step": step, "error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    # The folder of this file, which Python has put first, holds modules of this project.
    sys.path[0] = sys.argv[2]
    result = run(sys.argv[1], sys.argv[2])
    with open(os.path.join(sys.argv[1], "result.json"), "w") as result_file:
        json.dump(result, result_file)
