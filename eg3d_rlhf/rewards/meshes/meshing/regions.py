"""Patches that follow the surface: regions grown over neighbouring faces of similar normals. The default, for meshes of any kind.

Stands in for the mesh fusion of DreamCS, whose algorithm is not published. Choices are discrete, so topology gets no gradient.
Letters: M faces, P patches, F faces of a patch, K pairs of neighbouring faces.
"""

import numpy as np
import torch

from eg3d_rlhf.core.interfaces import Mesh
from eg3d_rlhf.rewards.meshes.meshing.features import Plan
from eg3d_rlhf.rewards.points.neighbours import farthest_points

SIMILAR, RELAX = 0.9, 0.1  # least cosine between a face and its region, and by how much it falls where nothing grows any more
SMALL = 0.1  # regions with less than this share of the mean area join a neighbour


@torch.no_grad()
def regions(mesh: Mesh, patches: int, faces: int) -> Plan:
    """A plan of P patches with F faces each; fewer patches, and a mask, where the mesh has fewer faces.

    Seeds are farthest points of the face centres. A region takes neighbouring faces whose normals are within `SIMILAR` of its mean one;
    what no region wants yet waits until the bound has been relaxed. Parts without a seed are regions of their own. Small regions join a
    neighbour, surplus ones the nearest; large ones are halved until there are P. F faces of each are taken evenly over its area, from its
    middle outwards: large faces may come twice, and small ones not at all.
    """
    triangles = mesh.vertices.detach().double().cpu().numpy()[mesh.faces.cpu().numpy()]  # [M, 3, 3]
    select, mask = np.zeros((patches, faces), dtype=np.int64), np.zeros(patches, dtype=bool)
    if len(triangles):
        label = grown(triangles, mesh.faces.cpu().numpy(), patches)
        count = int(label.max()) + 1
        select[:count], mask[:count] = _evenly(triangles, label, count, faces), True
    device = mesh.faces.device
    return Plan(None, None, mesh.faces, torch.from_numpy(select).to(device), torch.from_numpy(mask).to(device))


def grown(triangles: np.ndarray, faces: np.ndarray, patches: int) -> np.ndarray:
    """The region [M] of each face, 0..min(P, M) - 1, all used."""
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    double = np.linalg.norm(cross, axis=1)
    normals, areas, centres = cross / np.maximum(double, 1e-12)[:, None], double / 2, triangles.mean(axis=1)
    wanted, pairs = min(patches, len(faces)), neighbours(faces)
    seeds = farthest_points(torch.from_numpy(centres.T.copy())[None], wanted, "farthest")[0].numpy()
    label = _grow(normals, pairs, seeds)
    label = _merge(label, pairs, areas, centres, wanted)
    return _split(label, areas, centres, wanted)


def neighbours(faces: np.ndarray) -> np.ndarray:
    """Pairs [K, 2] of faces that share an edge; an edge of more than two faces joins each to the next one."""
    ends = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    key = ends[:, 0].astype(np.int64) * (int(faces.max(initial=0)) + 1) + ends[:, 1]
    order = np.argsort(key, kind="stable")
    same = key[order[1:]] == key[order[:-1]]
    return np.stack([order[:-1][same] // 3, order[1:][same] // 3], axis=1)


def _grow(normals: np.ndarray, pairs: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Regions of seeds [P]; parts of the mesh without one get numbers from P on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    label = np.full(len(normals), -1)
    label[seeds] = np.arange(len(seeds))
    total, bound = normals[seeds].copy(), SIMILAR
    beside = np.concatenate([pairs, pairs[:, ::-1]])
    beside = beside[np.argsort(beside[:, 0], kind="stable")]
    first, outer = np.searchsorted(beside[:, 0], np.arange(len(normals) + 1)), beside[:, 1]
    new, region, face = seeds, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    while True:  # what regions may take: what they could not take before, and what stands beside their new faces
        count = first[new + 1] - first[new]
        place = np.repeat(first[new] - count.cumsum() + count, count) + np.arange(count.sum())
        region, face = np.concatenate([region, np.repeat(label[new], count)]), np.concatenate([face, outer[place]])
        open_ = label[face] < 0
        region, face = region[open_], face[open_]
        if not len(face):
            break
        mean = total / np.maximum(np.sqrt((total * total).sum(axis=1)), 1e-12)[:, None]
        likeness = np.einsum("ki,ki->k", normals[face], mean[region])
        while not (wanted := likeness >= bound).any():
            bound -= RELAX
        order = np.argsort(likeness[wanted], kind="stable")  # a face that several regions want goes to the one it is most like
        new = np.unique(face[wanted])
        label[face[wanted][order]] = region[wanted][order]
        np.add.at(total, label[new], normals[new])
    left = label < 0
    if left.any():
        linked = left[pairs].all(axis=1)
        size = len(normals)
        graph = coo_array((np.ones(int(linked.sum())), (pairs[linked, 0], pairs[linked, 1])), shape=(size, size))
        part = connected_components(graph, directed=False)[1]
        label[left] = len(seeds) + np.unique(part[left], return_inverse=True)[1]
    return label


def _merge(label: np.ndarray, pairs: np.ndarray, areas: np.ndarray, centres: np.ndarray, wanted: int) -> np.ndarray:
    """Regions numbered 0.. without gaps, at most `wanted` of them."""
    while True:
        label = np.unique(label, return_inverse=True)[1]
        count = int(label.max()) + 1
        size = np.bincount(label, weights=areas, minlength=count)
        ends = label[pairs]
        ends = ends[ends[:, 0] != ends[:, 1]]
        beside = np.bincount(ends.flatten(), minlength=count) > 0
        small = beside & (size < SMALL * size.mean())
        if count <= wanted and not small.any():
            return label
        pick = int(np.where(small if small.any() else np.ones(count, dtype=bool), size, np.inf).argmin())
        if beside[pick]:
            touching = np.concatenate([ends[ends[:, 0] == pick, 1], ends[ends[:, 1] == pick, 0]])
            into = int(np.bincount(touching).argmax())
        else:
            middle = _means(label, centres, count)
            distance = np.linalg.norm(middle - middle[pick], axis=1)
            distance[pick] = np.inf
            into = int(distance.argmin())
        label[label == pick] = into


def _split(label: np.ndarray, areas: np.ndarray, centres: np.ndarray, wanted: int) -> np.ndarray:
    """Halves of the largest regions until there are `wanted`, a number that the faces suffice for."""
    count = int(label.max()) + 1
    while count < wanted:
        size = np.bincount(label, weights=areas, minlength=count)
        size[np.bincount(label, minlength=count) < 2] = -1
        members = np.flatnonzero(label == size.argmax())
        own = centres[members]
        first = own[np.linalg.norm(own - own.mean(0), axis=1).argmax()]
        second = own[np.linalg.norm(own - first, axis=1).argmax()]
        nearer = np.linalg.norm(own - second, axis=1) < np.linalg.norm(own - first, axis=1)
        nearer[-1] |= not nearer.any()  # faces that all have one centre
        label[members[nearer]] = count
        count += 1
    return label


def _means(label: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Mean of values [M, 3] in each region, [count, 3]."""
    number = np.bincount(label, minlength=count)
    return np.stack([np.bincount(label, weights=column, minlength=count) for column in values.T], axis=1) / number[:, None]


def _evenly(triangles: np.ndarray, label: np.ndarray, count: int, faces: int) -> np.ndarray:
    """F faces [count, F] of each region, evenly over its area, from its middle outwards."""
    centres = triangles.mean(axis=1)
    away = np.linalg.norm(centres - _means(label, centres, count)[label], axis=1)
    order = np.lexsort((away, label))
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    area = np.linalg.norm(cross, axis=1)[order] + 1e-12
    until, last = area.cumsum(), np.searchsorted(label[order], np.arange(count), side="right") - 1
    first = np.concatenate([[0], last[:-1] + 1])
    start, end = until[first] - area[first], until[last]
    at = start[:, None] + (end - start)[:, None] * (np.arange(faces) + 0.5) / faces
    return order[np.searchsorted(until, at).clip(first[:, None], last[:, None])]
