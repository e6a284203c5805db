"""Small plans, shapes and answers for tests of the store, and a reader of the browser's mesh format."""

import itertools
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from eg3d_rlhf.people.label.entities import Answer, Choice, Kind, PlannedPair, Shape
from eg3d_rlhf.people.label.store import Store

HASH = "a1" * 32
HOLE = "It has a hole."  # explanation of a practice shape
# settings of a campaign without checks or repeats
QUIET = {"gold_every": 0, "repeat_share": 0, "swap_share": 0}
SHAPE = Shape(generator="a" * 64, source="", seed=7, psi=1.0, level=10.0, resolution=32, triangles=500)
_keys = itertools.count()


def shape(seed: int, **changes) -> Shape:
    return replace(
        SHAPE,
        **{"generator": HASH, "seed": seed, "psi": 0.7, "resolution": 128, "triangles": 30_000, **changes},
    )


def numbered(count: int, first: int = 0, **fields) -> list[Shape]:
    """Shapes of consecutive seeds, to be drawn small."""
    return [replace(SHAPE, seed=first + i, **fields) for i in range(count)]


def plan(pairs: int, gold: int = 0, training: int = 0, start: int = 0) -> list[PlannedPair]:
    """Disjoint pairs of consecutive seeds: training, then pairs, then gold; the first shape is right where an
    answer is expected.
    """
    kinds = [Kind.TRAINING] * training + [Kind.PAIR] * pairs + [Kind.GOLD] * gold
    return [
        PlannedPair(
            first=shape(start + 2 * i),
            second=shape(start + 2 * i + 1),
            kind=kind,
            expected=None if kind is Kind.PAIR else "first",
            explanation=f"because {i}" if kind is Kind.TRAINING else "",
        )
        for i, kind in enumerate(kinds)
    ]


def singles(count: int, gold: int = 0, training: int = 0, first: int = 0) -> list[PlannedPair]:
    """Shapes by themselves: practice, then gold checks (both damaged), then what is asked."""
    kinds = [Kind.TRAINING] * training + [Kind.GOLD] * gold + [Kind.PAIR] * count
    return [
        PlannedPair(
            first=shape(first + i),
            second=shape(first + i),
            kind=kind,
            expected=None if kind is Kind.PAIR else "second",
            explanation=HOLE if kind is Kind.TRAINING else "",
        )
        for i, kind in enumerate(kinds)
    ]


def answer(assignment, key: str, choice: Choice = Choice.LEFT, **changes) -> Answer:
    token = assignment if isinstance(assignment, str) else assignment.token
    return Answer(**{"key": key, "assignment": token, "choice": choice, "milliseconds": 1500, **changes})


def answer_all(
    store: Store,
    campaign: int,
    who: int,
    choice: Choice | Callable = Choice.LEFT,
    most: int = 10_000,
    ahead: int = 3,
    ready: Callable | None = None,
    **changes,
) -> list[str]:
    """Answer until nothing is left, or so many; `choice`, or what it gives for the shapes on the left and
    right. Returns the tokens.
    """
    shapes = dict(store.shapes(campaign))
    tokens = []
    while len(tokens) < most and (shown := store.assignments(campaign, who, ahead, ready)):
        chosen = (
            choice(*(shapes[side] for side in (shown[0].left, shown[0].right)))
            if callable(choice)
            else choice
        )
        tokens.append(shown[0].token)
        store.submit(campaign, who, answer(tokens[-1], f"answer {next(_keys)}", chosen, **changes))
    return tokens


class Clock:
    def __init__(self, now: float = 1_750_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def decode_mesh(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] and faces [F, 3] of an uncompressed mesh; the page reads it in JavaScript."""
    magic, count, triangles, *numbers = struct.unpack_from("<4sII3f3f", data)
    assert magic == b"SHP1"
    positions = np.frombuffer(data, "<u2", 3 * count, 36).reshape(count, 3)
    padding = data[36 + 6 * count : 36 + 6 * count + -(6 * count) % 4]
    assert padding == bytes(len(padding))
    start = 36 + 6 * count + len(padding)
    dtype = np.dtype("<u2" if count <= 65536 else "<u4")
    faces = np.frombuffer(data, dtype, offset=start).reshape(triangles, 3)
    assert faces.max() < count and start + faces.nbytes == len(data)
    return (positions / 65535 * numbers[3:] + numbers[:3]).astype(np.float32), faces.astype(np.int32)
