"""Closed holes of a box."""

import numpy as np
import pytest
import trimesh

from eg3d_rlhf.geometry.mesh import count_edges, face_volumes
from eg3d_rlhf.geometry.mesh_holes import fill_rims


def test_holes_of_a_box_are_closed_with_its_volume():
    box = trimesh.creation.box(extents=(1, 2, 3))
    vertices = np.array(box.vertices)
    faces = np.array(box.faces)
    assert fill_rims(vertices, faces)[2] == 0
    for normal in np.eye(3):
        # without the two triangles of one side, and without those of both opposite sides
        sides = box.face_normals @ normal
        for removed, hole_count in ((sides > 0.5, 1), (np.abs(sides) > 0.5, 2)):
            opened = faces[~removed]
            assert not count_edges(opened).watertight
            closed_vertices, closed_faces, closed_count = fill_rims(vertices, opened)
            assert closed_count == hole_count and count_edges(closed_faces).watertight
            assert face_volumes(closed_vertices, closed_faces).sum() == pytest.approx(6)
            assert np.array_equal(closed_vertices[: len(vertices)], vertices)
