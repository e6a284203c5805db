"""Writes pickles in the format of EG3D's snapshots, honest and otherwise (eg3d.md, section 9)."""

import io
import pickle
import struct
from functools import cache
from typing import Any

import torch

from training import networks
from training.fullhead import FullHeadGenerator, HyPlaneHeadGenerator, PanoHeadGenerator, SphereHeadGenerator
from training.rendering.renderer import ImportanceRenderer

PLAIN_CLASSES = {
    "OSGDecoder": "training.triplane",
    "ImportanceRenderer": "training.volumetric_rendering.renderer",
    "MipRayMarcher2": "training.volumetric_rendering.ray_marcher",
    "RaySampler": "training.volumetric_rendering.ray_sampler",
    "Softplus": "torch.nn.modules.activation",
    "Sequential": "torch.nn.modules.container",
}
HEADS = {  # our names of what full heads' pickles call otherwise, all of them with module text
    "PanoHeadGenerator": "TriPlaneGenerator",
    "SphereHeadGenerator": "TriPlaneGenerator",
    "FeatureDecoder": "OSGDecoder",
    "HyPlaneHeadGenerator": "TriPlaneSingSphGenerator_flatten",
    "HeadRenderer": "ImportanceRenderer",
}
RENDERING = {
    "image_resolution": 128,
    "disparity_space_sampling": False,
    "clamp_mode": "softplus",
    "c_gen_conditioning_zero": False,
    "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
    "gpc_reg_prob": 0.5,
    "c_scale": 1.0,
    "sr_antialias": True,
    "superresolution_noise_mode": "none",
    "density_reg": 0.25,
    "decoder_lr_mul": 1.0,
    "depth_resolution": 3,
    "ray_start": 2.25,
    "depth_resolution_importance": 3,
    "ray_end": 3.3,
    "box_warp": 1,
    "avg_camera_radius": 2.7,
    "avg_camera_pivot": [0, 0, 0.2],
}
G_KWARGS = {
    "z_dim": 16,
    "c_dim": 25,
    "w_dim": 512,
    "img_resolution": 128,
    "img_channels": 3,
    "channel_base": 256,
    "channel_max": 4,
    "mapping_kwargs": {"num_layers": 2},
    "num_fp16_res": 0,
    "sr_num_fp16_res": 4,
    "conv_clamp": None,
    "fused_modconv_default": "inference_only",
    "rendering_kwargs": RENDERING,
    "sr_kwargs": {"channel_base": 256, "channel_max": 4, "fused_modconv_default": "inference_only"},
}
D_KWARGS = {
    "c_dim": 25,
    "img_resolution": 128,
    "img_channels": 3,
    "channel_base": 256,
    "channel_max": 4,
    "disc_c_noise": 0.0,
    "num_fp16_res": 4,
    "conv_clamp": 256,
    "block_kwargs": {"freeze_layers": 0},
    "mapping_kwargs": {},
    "epilogue_kwargs": {"mbstd_group_size": 4},
}


@cache
def stock_networks(layout: str = "eg3d") -> networks.Networks:
    """Networks with EG3D's hard-wired sizes and as few channels as they allow. Treat as read-only."""
    torch.manual_seed(1)
    nets = networks.build({**G_KWARGS, "plane_layout": layout}, D_KWARGS, {})
    nets.G.neural_rendering_resolution = nets.G_ema.neural_rendering_resolution = 8
    for tensor in (nets.G.backbone.mapping.w_avg, nets.G_ema.backbone.mapping.w_avg):
        tensor.normal_()
    with torch.no_grad():
        nets.G_ema.decoder.net[0].bias.add_(0.25)
    return nets


HEAD_RENDERING = {
    **RENDERING,
    "triplane_size": 8,
    "triplane_depth": 3,
    "decoder_activation": "none",
    "use_torgb_raw": True,
    "use_background": True,
    "trans_reg": 10.0,
    "c_scale": 1,
}
# by family, with rendering options of their own
HEAD_CLASSES: dict[str, tuple[type[FullHeadGenerator], dict]] = {
    "panohead": (PanoHeadGenerator, {}),
    "spherehead": (SphereHeadGenerator, {"parsing_flag": False}),
    "hyplanehead": (
        HyPlaneHeadGenerator,
        {
            "triplane_depth": 1,
            "multiplane_num": 1,
            "render_mode": "TriPlane_SingSph_flatten",
            "sph2cir_flag": True,
            "cir2squ_flag": True,
        },
    ),
}


@cache
def head_generator(family: str) -> tuple[FullHeadGenerator, dict]:
    """A small full head and its arguments. Treat as read-only."""
    cls, more = HEAD_CLASSES[family]
    kwargs = {**G_KWARGS, "w_dim": 16, "z_dim": 8, "rendering_kwargs": {**HEAD_RENDERING, **more}}
    torch.manual_seed(2)
    G = cls(**kwargs).eval().requires_grad_(False)
    G.neural_rendering_resolution = 8
    return G, kwargs


class Ref:
    """A global, by name."""

    def __init__(self, module: str, name: str):
        self.module = module
        self.name = name


@cache
def ref(module: str, name: str) -> Ref:
    """The one Ref of a name, so that pickles memoise it."""
    return Ref(module, name)


class Call:
    """REDUCE, and BUILD where there is a state."""

    def __init__(self, function: Any, args: tuple, state: Any = None):
        self.function = function
        self.args = args
        self.state = state


class New:
    """NEWOBJ, then SETITEMs, then BUILD."""

    def __init__(self, cls: Any, state: Any = None, items: dict | None = None, args: tuple = ()):
        self.cls = cls
        self.state = state
        self.items = items or {}
        self.args = args


class PersistentId:
    """BINPERSID."""

    def __init__(self, pid: Any):
        self.pid = pid


class Built:
    """BUILD on anything."""

    def __init__(self, value: Any, state: Any):
        self.value = value
        self.state = state


class Writer(pickle._Pickler):
    """Python's pickler with the opcodes above."""

    def save_ref(self, obj: Ref) -> None:
        """GLOBAL or STACK_GLOBAL."""
        if self.proto >= 4:
            self.save(obj.module), self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_call(self, obj: Call) -> None:
        """function, args, REDUCE [, state, BUILD]."""
        self.save(obj.function), self.save(obj.args)
        self.write(pickle.REDUCE)
        self.memoize(obj)
        self._state(obj.state)

    def save_new(self, obj: New) -> None:
        """class, args, NEWOBJ [, items] [, state, BUILD]."""
        self.save(obj.cls), self.save(obj.args)
        self.write(pickle.NEWOBJ)
        self.memoize(obj)
        for key, value in obj.items.items():
            self.save(key), self.save(value)
            self.write(pickle.SETITEM)
        self._state(obj.state)

    def save_persistent(self, obj: PersistentId) -> None:
        """value, BINPERSID."""
        self.save(obj.pid)
        self.write(pickle.BINPERSID)

    def save_built(self, obj: Built) -> None:
        """value, state, BUILD."""
        self.save(obj.value)
        self._state(obj.state)

    def _state(self, state: Any) -> None:
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)

    dispatch = {
        **pickle._Pickler.dispatch,
        Ref: save_ref,
        Call: save_call,
        New: save_new,
        PersistentId: save_persistent,
        Built: save_built,
    }


def dumps(value: Any, protocol: int = 4) -> bytes:
    """Pickle plain values and the classes above."""
    buffer = io.BytesIO()
    Writer(buffer, protocol).dump(value)
    return buffer.getvalue()


ORDERED = ref("collections", "OrderedDict")
TENSOR = ref("torch._utils", "_rebuild_tensor_v2")
PARAMETER = ref("torch._utils", "_rebuild_parameter")
FROM_BYTES = ref("torch.storage", "_load_from_bytes")
RECONSTRUCT = ref("torch_utils.persistence", "_reconstruct_persistent_obj")
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def storage_bytes(
    body: bytes,
    count: int,
    storage: Ref | None = None,
    pid: Any = None,
    magic: Any = MAGIC,
    system: Any = SYSTEM,
    claimed: int | None = None,
) -> bytes:
    """A legacy torch stream around the bytes of `count` elements; every part may be replaced."""
    key = "94017442461968"
    pid = (
        PersistentId(("storage", storage or ref("torch", "FloatStorage"), key, "cpu", count, None))
        if pid is None
        else pid
    )
    head = [dumps(v, 2) for v in (magic, 1001, system, pid, [key])]
    return b"".join(head) + struct.pack("<q", count if claimed is None else claimed) + body


def tensor_of(stream: bytes, shape: tuple, stride: tuple, offset: int = 0) -> Call:
    """A tensor on a stream."""
    return Call(TENSOR, (Call(FROM_BYTES, (stream,)), offset, shape, stride, False, Call(ORDERED, ())))


def tensor(value: torch.Tensor, storage: Ref | None = None) -> Call:
    """A tensor on a storage of its own."""
    value = value.detach().contiguous()
    return tensor_of(
        storage_bytes(value.numpy().tobytes(), value.numel(), storage), tuple(value.shape), value.stride()
    )


class SnapshotWriter:
    """One file's choices.

    Args:
        protocol: 2 to 5; numpy: 'numpy.core' or 'numpy._core'; source: embedded as module_src; storage: class
            that tensors name.
    """

    def __init__(
        self,
        protocol: int = 4,
        numpy: str = "numpy._core",
        source: str = "raise RuntimeError",
        storage: Ref | None = None,
    ):
        self.protocol = protocol
        self.source = source
        self.storage = storage
        self.scalar = ref(f"{numpy}.multiarray", "scalar")
        self.dtype = Call(ref("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))

    def easy(self, value: Any) -> Any:
        """Dictionaries as EasyDicts."""
        if isinstance(value, dict):
            return New(ref("dnnlib.util", "EasyDict"), items={k: self.easy(v) for k, v in value.items()})
        return value

    def module(self, module: torch.nn.Module, **extra) -> Call | New:
        """A module and those in it."""
        class_name = type(module).__name__
        name = HEADS.get(class_name, class_name)
        state = {
            "training": module.training,
            "_buffers": {k: tensor(v, self.storage) for k, v in module._buffers.items()},
            "_parameters": {
                k: None if v is None else Call(PARAMETER, (tensor(v, self.storage), False, Call(ORDERED, ())))
                for k, v in module._parameters.items()
            },
            "_modules": {k: None if v is None else self.module(v) for k, v in module._modules.items()},
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": Call(ORDERED, ()),
            **extra,
        }
        if isinstance(module, ImportanceRenderer):
            state["plane_axes"] = tensor(module.plane_axes, self.storage)
        if hasattr(module, "weight_gain"):
            state["weight_gain"] = Call(self.scalar, (self.dtype, struct.pack("<d", module.weight_gain)))
        if class_name in PLAIN_CLASSES:
            return New(ref(PLAIN_CLASSES[name], name), state)
        return self.persistent(name, state)

    def persistent(self, name: str, state: dict) -> Call:
        """A persistent class with its source."""
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": name, "state": state}
        return Call(RECONSTRUCT, (meta,))

    def generator(
        self, G: torch.nn.Module, kwargs: dict, label_std: torch.Tensor | None = None, **extra
    ) -> Call:
        """G with its constructor arguments; `extra` replaces attributes."""
        stated = self.easy({k: v for k, v in kwargs.items() if k != "plane_layout"})
        attributes = {
            "neural_rendering_resolution": G.neural_rendering_resolution,
            "rendering_kwargs": self.easy(G.rendering_kwargs),
            "_init_args": (),
            "_init_kwargs": stated,
            **extra,
        }
        record = self.module(G, **attributes)
        if label_std is not None:
            record.args[0]["state"]["_buffers"]["dataset_label_std"] = tensor(label_std)
        return record

    def discriminator(self, D: torch.nn.Module, kwargs: dict) -> Call:
        """D with its constructor arguments."""
        return self.module(D, _init_args=(), _init_kwargs=self.easy(kwargs))

    def snapshot(
        self, nets: networks.Networks, names: tuple[str, ...] = ("G", "D", "G_ema"), label_std=None, **others
    ) -> bytes:
        """A whole file; `others` are further entries."""
        content: dict = dict(others)
        for name in names:
            if name == "D":
                content["D"] = self.discriminator(nets.D, nets.D_kwargs)
            else:
                content[name] = self.generator(getattr(nets, name), nets.G_kwargs, label_std)
        return dumps(content, self.protocol)
