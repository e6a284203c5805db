"""A procedural family of heads: an implicit surface with about forty parameters, and its renderer."""

from training.heads.family import APPEARANCE_COUNT, APPEARANCE_NAMES, SHAPE_COUNT, SHAPE_NAMES, draw_parameters
from training.heads.render import BACKGROUNDS, render_heads
from training.heads.sdf import head_parts, head_sdf

__all__ = [
    "APPEARANCE_COUNT",
    "APPEARANCE_NAMES",
    "BACKGROUNDS",
    "SHAPE_COUNT",
    "SHAPE_NAMES",
    "draw_parameters",
    "head_parts",
    "head_sdf",
    "render_heads",
]
