"""Names of the toy's prompts and stages. This file does not import torch, so that `--help` is fast."""

COLOURS = {  # red, green, blue in 0..1
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.90, 0.20),
    "lime": (0.65, 0.90, 0.25),
    "green": (0.15, 0.55, 0.20),
    "cyan": (0.15, 0.80, 0.80),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.50, 0.20, 0.75),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.50, 0.30, 0.15),
    "grey": (0.55, 0.55, 0.55),
    "white": (0.95, 0.95, 0.95),
}
# The order of `toy_pipeline.shapes_at`, which numbers the classes of shapes.
SHAPES = (
    "ball",
    "box",
    "pyramid",
    "pillar",
    "table",
    "chair",
    "arch",
    "cross",
    "stairs",
    "cup",
    "ring",
    "tower",
    "mushroom",
    "hammer",
    "sofa",
    "bridge",
)
# All prompts, such as "red ball".
PROMPTS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
STRUCTURE = "structure"
VOXELS = "voxels"

STAGES = (STRUCTURE, VOXELS)
