"""Which family a generator's pickle belongs to, by the names and shapes of its tensors; its classes and options follow from that.

The released files of all families carry the same few class names, so that these decide nothing; nor is any text in a file consulted.
"""

import dataclasses
from typing import Any

from eg3d_rlhf.generators.pickles.machine import Refusal, brief
from eg3d_rlhf.generators.pickles.options import FLAG, NUMBER, POSITIVE, maybe, one_of, whole
from training.fullhead import ACTIVATIONS, HyPlaneHeadGenerator, PanoHeadGenerator, SphereHeadGenerator
from training.triplane import TriPlaneGenerator

RENDER_MODE = "TriPlane_SingSph_flatten"
_PLANES, _CHANNELS = 3, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A family as its pickles show it."""

    architecture: str  # as our network files name it
    cls: Any  # of the network
    class_names: tuple[str, ...]  # of the pickled generator
    layouts: tuple[str, ...]  # of the planes, that the renderer may carry
    rendering: dict  # options that it needs beyond EG3D's
    optional: dict = dataclasses.field(default_factory=dict)  # checked where they are stated


_HEAD = {
    "triplane_size": whole(4, 4096), "triplane_depth": whole(1, 64), "decoder_activation": one_of(*ACTIVATIONS), "use_torgb_raw": FLAG,
    "use_background": FLAG,
}
_OURS = {"triplane_extent": POSITIVE, "side_margin": maybe(NUMBER)}
EG3D = Kind(architecture="eg3d", cls=TriPlaneGenerator, class_names=("TriPlaneGenerator",), layouts=("eg3d", "fixed"), rendering={})
PANOHEAD = Kind(
    architecture="panohead", cls=PanoHeadGenerator, class_names=("TriPlaneGenerator", "TriGridGenerator"), layouts=("panohead",),
    rendering=_HEAD, optional=_OURS,
)
SPHEREHEAD = Kind(
    architecture="spherehead", cls=SphereHeadGenerator, class_names=("TriPlaneGenerator",), layouts=(),
    rendering={**_HEAD, "triplane_depth": one_of(3)}, optional={**_OURS, "parsing_flag": one_of(False)},
)
HYPLANEHEAD = Kind(
    architecture="hyplanehead", cls=HyPlaneHeadGenerator, class_names=("TriPlaneSingSphGenerator_flatten",), layouts=("panohead",),
    rendering={
        **_HEAD, "triplane_depth": one_of(1), "multiplane_num": one_of(1), "render_mode": one_of(RENDER_MODE), "sph2cir_flag": FLAG,
        "cir2squ_flag": FLAG,
    },
    optional=_OURS,
)
KINDS = EG3D, PANOHEAD, SPHEREHEAD, HYPLANEHEAD


def check_class(class_name: str) -> None:
    """Raise Refusal for a generator of no known class."""
    known = tuple(dict.fromkeys(name for kind in KINDS for name in kind.class_names))
    if class_name not in known:
        raise Refusal(f"a generator of class {brief(class_name)} instead of {' or '.join(map(repr, known))}")


def kind_of(class_name: str, shapes: dict[str, tuple[int, ...]], rendering: dict) -> Kind:
    """The family of a generator by its state dict's names and shapes.

    Two stacks of convolutions: SphereHead. Else a network for the camera and one map of 32 channels: HyPlaneHead; or 96 to a slice:
    PanoHead. Without that network: EG3D. Raises: Refusal for a class of another family, other channels, or an unknown render_mode.
    """
    heads = [name for name in shapes if name.startswith("backbone.synthesis.b") and name.endswith(".torgb.weight")]
    last = max(heads, key=lambda name: (len(name), name), default="")
    channels = shapes[last][0] if last and shapes[last] else 0
    if "ConvA.0.weight" in shapes:
        kind = SPHEREHEAD
    elif not any(name.startswith("t_mapping.") for name in shapes):
        kind = EG3D
    elif "render_mode" in rendering and rendering["render_mode"] != RENDER_MODE:
        raise Refusal(f"render_mode = {brief(rendering['render_mode'])} instead of {RENDER_MODE!r}")
    elif channels == _CHANNELS and "render_mode" in rendering:
        kind = HYPLANEHEAD
    elif channels and channels % (_PLANES * _CHANNELS) == 0:
        kind = PANOHEAD
    else:
        raise Refusal(f"a full-head generator whose backbone gives {channels} channels")
    if class_name not in kind.class_names:
        raise Refusal(f"a generator of class {brief(class_name)} with the tensors of {kind.architecture}")
    return kind
