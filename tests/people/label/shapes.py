"""Shapes for tests that need some."""

from dataclasses import replace

from eg3d_rlhf.people.label.entities import Shape

SHAPE = Shape(generator="a" * 64, source="", seed=7, psi=1.0, level=10.0, resolution=32, triangles=500)


def numbered(count: int, first: int = 0, **fields) -> list[Shape]:
    """Shapes of consecutive seeds."""
    return [replace(SHAPE, seed=first + i, **fields) for i in range(count)]
