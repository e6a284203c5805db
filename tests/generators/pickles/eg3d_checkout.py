"""A folder of the shape of a checkout of EG3D, with tiny classes of our own in place of EG3D's.

The classes hold the tensors that a JSON file lists, so that the weights of a given network fit them. The
decorator of torch_utils.persistence writes objects as EG3D's does: a call of _reconstruct_persistent_obj with
the class's source text, its name and the object's state.
"""

import json
from pathlib import Path
from typing import Any

from training import networks

PERSISTENCE = """
import copy
import sys
import types


def persistent_class(cls):
    source = open(sys.modules[cls.__module__].__file__).read()

    class Decorated(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args = copy.deepcopy(args)
            self._init_kwargs = copy.deepcopy(kwargs)

        def __reduce__(self):
            state = {k: v for k, v in self.__dict__.items()}
            meta = dict(type="class", version=6, module_src=source, class_name=cls.__name__, state=state)
            return (_reconstruct_persistent_obj, (meta,))

    Decorated.__name__ = cls.__name__
    return Decorated


def _reconstruct_persistent_obj(meta):
    module = types.ModuleType("persistent")
    module.__file__ = FOLDER + "/training/" + FILES[meta["class_name"]]
    sys.modules[module.__name__] = module
    exec(meta["module_src"], module.__dict__)
    obj = getattr(module, meta["class_name"]).__new__(getattr(module, meta["class_name"]))
    obj.__dict__.update(meta["state"])
    return obj


FOLDER = __file__.rpartition("/torch_utils/")[0]
FILES = dict(Tree="triplane.py", TriPlaneGenerator="triplane.py", DualDiscriminator="dual_discriminator.py")
FILES["AugmentPipe"] = "augment.py"
"""
TREE = '''
import json
import torch
import torch_utils.persistence as persistence


def grow(root, names, make, renderer):
    """Add the tensors of a list to a module, in modules of their own."""
    for name, (shape, is_parameter) in names.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, make())
            module = module._modules[part]
        value = torch.zeros(shape)
        if is_parameter:
            module.register_parameter(leaf, torch.nn.Parameter(value))
        else:
            module.register_buffer(leaf, value)
    if renderer:
        root.add_module("renderer", make())
        root.renderer.plane_axes = torch.zeros(3, 3, 3)


@persistence.persistent_class
class Tree(torch.nn.Module):
    pass

'''
GENERATOR = """
@persistence.persistent_class
class TriPlaneGenerator(torch.nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, img_resolution, img_channels, rendering_kwargs={}, **others):
        super().__init__()
        self.rendering_kwargs = rendering_kwargs
        self.neural_rendering_resolution = 64
        grow(self, json.load(open(persistence.FOLDER + "/G.json")), Tree, True)

    def forward(self, z):
        return z @ self.backbone.mapping.fc0.weight[:, :z.shape[1]].T
"""
DISCRIMINATOR = """
import json
import torch
import torch_utils.persistence as persistence
import training.triplane as triplane


@persistence.persistent_class
class DualDiscriminator(torch.nn.Module):
    def __init__(self, c_dim, img_resolution, img_channels, **kwargs):
        super().__init__()
        triplane.grow(self, json.load(open(persistence.FOLDER + "/D.json")), triplane.Tree, False)
"""
AUGMENT = """
import torch
import torch_utils.persistence as persistence


@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    def __init__(self, xflip=0):
        super().__init__()
        self.xflip = xflip
        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", torch.arange(3.0))
"""
DNNLIB = """
class EasyDict(dict):
    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


EasyDict.__module__ = "dnnlib.util"
"""
# What EG3D's tools do with a pickle, with the checkout alone: print facts of it as JSON.
READER = """
import json
import pickle
import sys

sys.path[0] = sys.argv[1]
with open(sys.argv[2], "rb") as file:
    data = pickle.load(file)
G = data["G_ema"]
torch = sys.modules["torch"]
facts = {
    "keys": list(data),
    "classes": {k: type(v).__name__ for k, v in data.items() if k != "training_set_kwargs"},
    "sums": {
        k: {n: float(t.double().sum()) for n, t in data[k].state_dict().items()} for k in ("G", "D", "G_ema")
    },
    "init_kwargs": {"G": G._init_kwargs, "D": data["D"]._init_kwargs},
    "axes": G.renderer.plane_axes.tolist(),
    "resolution": [data[k].neural_rendering_resolution for k in ("G", "G_ema")],
    "training": [data[k].training for k in ("G", "D", "G_ema")],
    "gradients": [p.requires_grad for k in ("G", "D") for p in data[k].parameters()],
    "easy": type(G._init_kwargs["rendering_kwargs"]).__name__,
    "training_set_kwargs": data["training_set_kwargs"],
    "p": None if data["augment_pipe"] is None else float(data["augment_pipe"].p),
    "output": G(torch.ones(1, 4)).tolist(),
}
print(json.dumps(facts))
"""


def write_checkout(folder: Path, nets: networks.Networks) -> Path:
    """Write the folder for networks of these shapes, with its packages in the subfolder eg3d; return it."""
    files = {
        "torch_utils/__init__.py": "",
        "torch_utils/persistence.py": PERSISTENCE,
        "dnnlib/__init__.py": "from dnnlib.util import EasyDict\n",
        "dnnlib/util.py": DNNLIB,
        "training/__init__.py": "",
        "training/triplane.py": TREE + GENERATOR,
        "training/dual_discriminator.py": DISCRIMINATOR,
        "training/augment.py": AUGMENT,
        "G.json": json.dumps(_shapes(nets.G)),
        "D.json": json.dumps(_shapes(nets.D)),
    }
    for name, text in files.items():
        path = folder / "eg3d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def _shapes(module: Any) -> dict[str, tuple[list[int], bool]]:
    parameters = dict(module.named_parameters())
    return {name: (list(tensor.shape), name in parameters) for name, tensor in module.state_dict().items()}
