"""Does a latent have one shape? Agreement of neighbouring views in colour, depth and surface normals.

Every measure is per latent, lower is better, and independent of the programmatic annotator: it reads renderings, never the sigma grid.
Shape letters: N latents, F views, R pixels per edge.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eg3d_rlhf.metrics.views import Match, Renders, Views, ViewSpec, inner_foreground, match_views, render_views, sample_map, spec_for

HIDDEN_MARGIN = 0.10  # world units; a point further than this behind the other view's surface is taken to be hidden there
MIN_PIXELS = 16  # co-visible pixels over all pairs below which a latent gets the worst value of a measure
WORST_COLOUR = 2.0  # the whole range of [-1, 1]
WORST_NORMAL = 180.0  # degrees


@dataclass(frozen=True, kw_only=True)
class MultiViewMeasures:
    """One value per latent, float64 [N]; lower is better except `covisible`, which says how much was compared."""

    photometric: np.ndarray  # mean L1 colour difference of matched pixels, 0..2
    depth: np.ndarray  # mean depth disagreement of matched pixels, as a fraction of the camera distance, 0..0.037 at radius 2.7
    normal: np.ndarray  # mean angle between matched surface normals, degrees, 0..180
    covisible: np.ndarray  # matched share of the foreground pixels, 0..1

    def to_dict(self) -> dict[str, list[float]]:
        """Plain JSON lists."""
        return {name: values.tolist() for name, values in asdict(self).items()}


def normals_from_points(points: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals [N, R, R, 3] of a point map [N, R, R, 3], and where they are known.

    Cross product of the central differences along the rows and columns; the sign faces the camera for a surface seen from outside
    (columns run right and rows run down the image, so down x right points at the viewer). Known where all four neighbours are foreground.
    """
    right = F.pad((points[:, :, 2:] - points[:, :, :-2]).permute(0, 3, 1, 2), (1, 1, 0, 0))  # [N, 3, R, R]
    down = F.pad((points[:, 2:] - points[:, :-2]).permute(0, 3, 1, 2), (0, 0, 1, 1))
    normal = torch.linalg.cross(down, right, dim=1)
    length = normal.norm(dim=1, keepdim=True)
    known = inner_foreground(foreground) & (length[:, 0] > 1e-12)
    return (normal / length.clamp_min(1e-12)).permute(0, 2, 3, 1), known


def _photometric(views: Views, target: int, source: int, match: Match) -> tuple[Tensor, Tensor]:
    warped = sample_map(views.image[:, source], match.grid)
    return (warped - views.image[:, target]).abs().mean(dim=1), match.visible


def _depth(views: Views, target: int, source: int, match: Match) -> tuple[Tensor, Tensor]:
    # capped on the near side too, so that one far floater weighs no more than the largest gap that is not taken for occlusion
    return (match.distance - match.depth).abs().clamp_max(HIDDEN_MARGIN) / match.distance.clamp_min(1e-6), match.visible


def _normal(views: Views, target: int, source: int, match: Match) -> tuple[Tensor, Tensor]:
    here, here_known = normals_from_points(views.points[:, target], views.foreground[:, target])
    there, there_known = normals_from_points(views.points[:, source], views.foreground[:, source])
    maps = torch.cat([there.permute(0, 3, 1, 2), there_known[:, None].float()], dim=1)  # [N, 4, R, R]
    sampled = sample_map(maps, match.grid)
    direction = F.normalize(sampled[:, :3], dim=1).permute(0, 2, 3, 1)
    chord = (here - direction).norm(dim=-1).clamp_max(2.0)  # stable at small angles, where acos of a rounded cosine is not
    angle = torch.rad2deg(2 * torch.asin(chord / 2))
    return angle, match.visible & here_known & (sampled[:, 3] > 0.999)


def _mean_over_pairs(errors: list[tuple[Tensor, Tensor]], worst: float) -> np.ndarray:
    """Mean error over the valid pixels of all pairs, [N] float64; `worst` where fewer than MIN_PIXELS are valid."""
    total = sum(torch.where(valid, error, 0.0).double().sum(dim=(1, 2)) for error, valid in errors)
    count = sum(valid.sum(dim=(1, 2)) for _, valid in errors)
    mean = total / count.clamp_min(1)
    return torch.where((count >= MIN_PIXELS) & mean.isfinite(), mean, worst).cpu().numpy()


@torch.no_grad()
def compare_views(views: Views, spec: ViewSpec) -> MultiViewMeasures:
    """Measure rendered views; every ordered pair of neighbouring cameras counts, weighted by its matched pixels.

    photometric: |I_source(pi(X)) - I_target| for the point X behind each target pixel, pi the source's projection;
    depth: | |X - o_source| - d_source(pi(X)) | / |X - o_source|, capped at HIDDEN_MARGIN before the division;
    normal: angle between the normals of the two depth maps at X, both in world axes.
    A latent with almost nothing to match (empty, or all haze below the opacity threshold) gets the worst value of each.
    """
    matches = [(t, s, match_views(views, t, s, HIDDEN_MARGIN)) for t, s in spec.pairs]

    def measure(error: Callable[[Views, int, int, Match], tuple[Tensor, Tensor]], worst: float) -> np.ndarray:
        return _mean_over_pairs([error(views, *entry) for entry in matches], worst)

    matched = sum(m.visible.sum(dim=(1, 2)) for _, _, m in matches)
    foreground = sum(views.foreground[:, t].sum(dim=(1, 2)) for t, _, _ in matches)
    return MultiViewMeasures(
        photometric=measure(_photometric, WORST_COLOUR),
        depth=measure(_depth, HIDDEN_MARGIN / spec.radius),
        normal=measure(_normal, WORST_NORMAL),
        covisible=(matched / foreground.clamp_min(1)).double().cpu().numpy(),
    )


@torch.no_grad()
def multi_view_measures(
    G: Renders, ws: Tensor, spec: ViewSpec | None = None, batch: int = 8, on_batch: Callable[[int], None] | None = None
) -> MultiViewMeasures:
    """Render latents ws [N, L, Wd] from the cameras of `spec` and compare neighbouring views.

    Args: `batch` latents are rendered at once; `on_batch` is told how many after each, for a progress bar.
    Returns one value per latent and measure. Deterministic: constant noise, fixed ray jitter.
    """
    spec = spec or spec_for(G)
    if len(ws) == 0:
        raise ValueError("multi_view_measures: expected at least one latent, got none. Pass ws [N, L, W].")
    parts = []
    for chunk in ws.split(batch):
        parts.append(compare_views(render_views(G, chunk, spec), spec))
        if on_batch is not None:
            on_batch(len(chunk))
    names = MultiViewMeasures.__dataclass_fields__
    return MultiViewMeasures(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
