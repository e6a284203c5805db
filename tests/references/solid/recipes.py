"""Shapes with closed forms. All y up. Returned before `clean` (which scales to a longest edge of 1)."""

import numpy as np
import trimesh


def T(m):
    return np.asarray(m.vertices, float), np.asarray(m.faces)


def cat(*ms):
    V = []
    F = []
    k = 0
    for v, f in ms:
        V.append(v)
        F.append(np.asarray(f) + k)
        k += len(v)
    return np.concatenate(V), np.concatenate(F)


def move(m, t):
    return m[0] + np.asarray(t, float), m[1]


def flip(m):
    return m[0], m[1][:, ::-1]


def sphere(r=0.5, s=4):
    return T(trimesh.creation.icosphere(subdivisions=s, radius=r))


def box(e=(1, 1, 1), c=(0, 0, 0)):
    v, f = T(trimesh.creation.box(extents=e))
    return v + np.asarray(c, float), f


def torus(R=0.35, r=0.15, n=96, m=48):
    u, w = np.meshgrid(np.arange(n) * 2 * np.pi / n, np.arange(m) * 2 * np.pi / m, indexing="ij")
    V = np.stack(
        [(R + r * np.cos(w)) * np.cos(u), r * np.sin(w), (R + r * np.cos(w)) * np.sin(u)], -1
    ).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(n), np.arange(m), indexing="ij")
    a = i * m + j
    b = (i + 1) % n * m + j
    c = (i + 1) % n * m + (j + 1) % m
    d = i * m + (j + 1) % m
    F = np.concatenate([np.stack([a, d, c], -1).reshape(-1, 3), np.stack([a, c, b], -1).reshape(-1, 3)])
    return V, F


def plane(n=8):
    g = np.stack(
        np.meshgrid(np.linspace(-0.5, 0.5, n + 1), np.linspace(-0.5, 0.5, n + 1), indexing="ij"), -1
    ).reshape(-1, 2)
    V = np.stack([g[:, 0], 0 * g[:, 0], g[:, 1]], 1)
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    a = i * (n + 1) + j
    b = a + n + 1
    return V, np.concatenate(
        [np.stack([a, a + 1, b + 1], -1).reshape(-1, 3), np.stack([a, b + 1, b], -1).reshape(-1, 3)]
    )


def moebius(n=64, m=4, w=0.15, R=0.35):
    V = []
    for i in range(n):
        t = 2 * np.pi * i / n
        for j in range(m + 1):
            s = w * (2 * j / m - 1)
            V.append(
                [(R + s * np.cos(t / 2)) * np.cos(t), s * np.sin(t / 2), (R + s * np.cos(t / 2)) * np.sin(t)]
            )
    F = []
    for i in range(n):
        for j in range(m):
            a = i * (m + 1) + j
            b = i * (m + 1) + j + 1
            if i + 1 < n:
                c = a + m + 1
                d = b + m + 1
            else:
                c = m - j
                d = m - j - 1
            F += [[a, b, d], [a, d, c]]
    return np.array(V), np.array(F)


def revolve(prof, n=64):
    """closed solid of revolution about y from a profile [(r,y)] starting and ending on the axis (r=0), walked
    bottom to top outside
    """
    V = []
    rows = []
    for r, y in prof:
        if r == 0:
            rows.append([len(V)])
            V.append([0, y, 0])
        else:
            rows.append(list(range(len(V), len(V) + n)))
            V += [[r * np.cos(2 * np.pi * k / n), y, r * np.sin(2 * np.pi * k / n)] for k in range(n)]
    F = []
    for a, b in zip(rows[:-1], rows[1:], strict=True):
        for k in range(n):
            l = (k + 1) % n
            if len(a) == 1:
                F.append([a[0], b[k], b[l]])
            elif len(b) == 1:
                F.append([a[k], b[0], a[l]])
            else:
                F += [[a[k], b[k], b[l]], [a[k], b[l], a[l]]]
    return np.array(V, float), np.array(F)


def cup_solid(R=0.5, r=0.45, H=1.0, floor=0.05, n=64):
    return revolve([(0, 0), (R, 0), (R, H), (r, H), (r, floor), (0, floor)], n)  # closed solid with walls


def cup_sheet(R=0.5, H=1.0, n=64):  # one-sided sheet without thickness, open on top
    V, F = revolve([(0, 0), (R, 0), (R, H), (0, H)], n)
    return V[:-1], F[(F < len(V) - 1).all(1)]


def prism(poly, h, dx=(0, 0)):
    """convex polygon [(x,z)] from y=0 to h, the top shifted by dx (leaning)"""
    p = np.asarray(poly, float)
    n = len(p)
    lo = np.stack([p[:, 0], np.zeros(n), p[:, 1]], 1)
    hi = np.stack([p[:, 0] + dx[0], np.full(n, h), p[:, 1] + dx[1]], 1)
    V = np.concatenate([lo, hi])
    F = []
    for i in range(1, n - 1):
        F += [[0, i, i + 1], [n, n + i + 1, n + i]]
    for i in range(n):
        j = (i + 1) % n
        F += [[i, n + i, n + j], [i, n + j, j]]
    return V, np.array(F)


def tower(w=0.3, h=1.0, lean=0.0):
    return prism([(0, 0), (w, 0), (w, w), (0, w)], h, (lean, 0))


def table(legs=3, top=0.4, tt=0.05, leg=0.04, h=0.5, at=0.3, n=48, off=(0, 0)):
    """round top of radius `top`, thickness tt at height h..h+tt; square legs of edge `leg` at radius `at`;
    overlapping the top by 0.01 (a union of closed parts)
    """
    a = np.arange(n) * 2 * np.pi / n
    d = move(prism(np.stack([top * np.cos(a), top * np.sin(a)], 1), tt), (off[0], h, off[1]))
    ms = [d]
    for k in range(legs):
        t = 2 * np.pi * k / legs
        ms.append(box((leg, h + 0.01, leg), (at * np.cos(t), (h + 0.01) / 2, at * np.sin(t))))
    return cat(*ms)


def cut(m, keep):
    V, F = m
    return V, F[keep]


def orient(m):
    V, F = m
    v = np.einsum("ij,ij->i", V[F[:, 0]], np.cross(V[F[:, 1]], V[F[:, 2]])).sum()
    return (V, F if v >= 0 else F[:, ::-1])


def seams(m):
    V, F = m
    # every face with corners of its own, as OBJ/GLB with seams
    return V[F.reshape(-1)], np.arange(3 * len(F)).reshape(-1, 3)


def bumpy(s=5, k=9, a=0.02):
    V, F = sphere(0.5, s)
    u = V / 0.5
    return V * (
        1 + a / 0.5 * (np.sin(k * 2 * u[:, :1]) * np.sin(k * 2 * u[:, 1:2]) * np.sin(k * 2 * u[:, 2:]))
    ), F


def all_shapes():
    S = {}
    S["sphere"] = sphere()
    S["box"] = box()
    S["slab"] = box((1, 0.02, 0.6))
    S["torus"] = torus()
    S["two spheres"] = cat(sphere(0.2), move(sphere(0.1), (0.7, 0, 0)))
    S["sphere and floater"] = cat(sphere(0.4), move(sphere(0.04, 2), (0.5, 0.5, 0.5)))
    S["hollow sphere"] = cat(sphere(0.5), flip(sphere(0.4)))
    S["sphere in sphere, both outward"] = cat(sphere(0.5), sphere(0.4))
    S["overlapping boxes"] = cat(box((1, 0.5, 0.5)), box((0.5, 1, 0.5)))
    S["boxes sharing an edge"] = cat(box((0.5,) * 3), box((0.5,) * 3, (0.5, 0.5, 0)))
    S["boxes sharing a corner"] = cat(box((0.5,) * 3), box((0.5,) * 3, (0.5, 0.5, 0.5)))
    S["boxes sharing a face"] = cat(box((0.5,) * 3), box((0.5,) * 3, (0.5, 0, 0)))
    S["solid cup"] = orient(cup_solid())
    S["sheet cup"] = cup_sheet()
    S["plane"] = plane()
    S["moebius"] = moebius()
    b = box((1, 1, 1))
    S["box without lid"] = cut(b, ~np.all(b[0][b[1]][:, :, 1] > 0.49, axis=1))
    f = b[1].copy()
    f[3] = f[3][::-1]
    S["box, one face flipped"] = (b[0], f)
    S["box inside out"] = flip(b)
    S["box with seams"] = seams(b)
    S["box, doubled faces"] = (b[0], np.concatenate([b[1], b[1]]))
    V, F = sphere()
    c = V[F].mean(1)
    S["sphere with a hole"] = (V, F[c[:, 1] < 0.46])
    S["hollow sphere with a hole"] = cat(
        *[
            (v, f[~((v[f].mean(1)[:, 1] > 0) & (np.hypot(v[f].mean(1)[:, 0], v[f].mean(1)[:, 2]) < 0.06))])
            for v, f in (sphere(0.5, 5), flip(sphere(0.4, 5)))
        ]
    )
    S["table, 3 legs"] = table(3)
    S["table, 4 legs"] = table(4)
    S["table, 3 legs, top off by .25"] = table(3, off=(-0.25, 0))
    for l in (0.2, 0.4):
        S[f"tower, lean {l}"] = orient(tower(lean=l))
    S["bumpy sphere"] = bumpy()
    S["tetrahedron"] = (
        np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]]),
        np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
    )
    return S
