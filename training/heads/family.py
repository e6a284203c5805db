"""The parameters of the procedural head family: names, meaning, ranges and how they are drawn.

Every parameter is normalised: shape parameters lie in [-1, 1] (0 is the average head), appearance parameters in [0, 1] for colours and
amounts and [-1, 1] for directions. Shape letters: N heads, S shape parameters, A appearance parameters.
"""

import colorsys
from typing import Any

import numpy as np

SHAPE_NAMES = (
    "head_width",  # skull and face width, +-9 %
    "head_height",  # skull height, +-8 %
    "head_depth",  # front-to-back skull length, +-8 %
    "jaw_width",  # lower face width, +-16 %
    "chin",  # length and protrusion of the chin, +-0.02 world units
    "nose_length",  # protrusion of the nose tip, +-0.022
    "nose_width",  # radius of the nose, +-25 %
    "brow",  # protrusion of the brow ridge and depth of the eye sockets
    "cheeks",  # fullness of the cheeks
    "eye_spacing",  # distance between the eyes, +-0.009
    "eye_size",  # eyeball radius and opening, +-14 %
    "ears",  # ear size, +-25 %
    "neck_width",  # +-16 %
    "lips",  # lip fullness
    "hair_volume",  # thickness of the hair shell over the skull, 0.008 .. 0.032
    "hair_length",  # how far the hair reaches down behind and beside the face: ears .. shoulders
)
APPEARANCE_NAMES = (
    *("skin_r", "skin_g", "skin_b"),  # albedo, 0..1
    *("hair_r", "hair_g", "hair_b"),
    *("iris_r", "iris_g", "iris_b"),
    *("lip_r", "lip_g", "lip_b"),
    *("shirt_r", "shirt_g", "shirt_b"),
    "brow_darkness",  # 0 skin-like .. 1 the hair's colour
    "brow_thickness",  # 0 thin .. 1 thick
    "blush",  # redness of the cheeks, 0..1
    "mouth_width",  # painted corners of the mouth, 0..1
    "light_x",  # direction of the key light: -1 from the head's -x side .. 1 from its +x side
    "light_y",  # -1 level .. 1 from high above
    "ambient",  # 0 contrasty .. 1 flat
    *("background_r", "background_g", "background_b"),  # used only by background='flat'
)
SHAPE_COUNT = len(SHAPE_NAMES)
APPEARANCE_COUNT = len(APPEARANCE_NAMES)

_SKIN_RAMP = np.array([[0.34, 0.20, 0.14], [0.55, 0.35, 0.24], [0.76, 0.53, 0.39], [0.90, 0.70, 0.56], [0.96, 0.80, 0.69]])
_HAIR = np.array([[0.06, 0.05, 0.05], [0.17, 0.10, 0.06], [0.33, 0.19, 0.10], [0.55, 0.28, 0.12], [0.80, 0.62, 0.33], [0.62, 0.60, 0.58]])
_IRIS = np.array([[0.24, 0.13, 0.06], [0.36, 0.24, 0.10], [0.24, 0.42, 0.28], [0.25, 0.45, 0.65], [0.42, 0.48, 0.52]])


def _jitter(rng: np.random.Generator, colour: np.ndarray, amount: float) -> np.ndarray:
    return np.clip(colour * (1 + amount * rng.standard_normal()) + 0.5 * amount * rng.standard_normal(3) * colour, 0.02, 1.0)


def _draw_appearance(rng: np.random.Generator) -> np.ndarray:
    tone = rng.uniform(0, len(_SKIN_RAMP) - 1)
    skin = np.array([np.interp(tone, np.arange(len(_SKIN_RAMP)), column) for column in _SKIN_RAMP.T])
    skin = _jitter(rng, skin, 0.03)
    hair = _jitter(rng, _HAIR[rng.choice(len(_HAIR), p=[0.25, 0.25, 0.2, 0.1, 0.14, 0.06])], 0.12)
    iris = _jitter(rng, _IRIS[rng.integers(len(_IRIS))], 0.1)
    lip = np.clip(skin * np.array([0.88, 0.52, 0.52]) * (1 + 0.08 * rng.standard_normal()) + [0.05 * rng.random(), 0, 0], 0, 1)
    shirt = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.15, 0.8), rng.uniform(0.3, 0.85))
    amounts = rng.uniform([0.55, 0, 0, 0], [1, 1, 1, 1])
    light = [rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0, 1)]
    background = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.4, 1.0))
    return np.concatenate([skin, hair, iris, lip, shirt, amounts, light, background])


def draw_parameters(rng: Any) -> tuple[np.ndarray, np.ndarray]:
    """One head of the family.

    Shape parameters are normal with deviation 0.5 clipped to [-1, 1], except the two of the hair, which are uniform. Skin follows a
    ramp of measured-looking tones, hair and irises are drawn from a small palette with jitter, lips follow the skin.

    Args: rng: source of every draw; the order of the draws is fixed.
    Returns: shape [S] and appearance [A], float32.
    """
    shape = np.clip(rng.standard_normal(SHAPE_COUNT) * 0.5, -1, 1)
    for name in ("hair_length", "hair_volume"):
        shape[SHAPE_NAMES.index(name)] = rng.uniform(-1, 1)
    return shape.astype(np.float32), _draw_appearance(rng).astype(np.float32)
