"""Pairs of TRELLIS's latents from what people have: a ranked list of assets, or a folder of samples as the
DSO project writes it.

Ranked list: JSON lines, one per asset, paths relative to the list:
    {"condition": "a red chair", "rank": 1, "structure": "ss_latents/0a.npz", "latent": "latents/0a.npz"}
    {"condition": "a red chair", "rank": 2, "asset": "0b.ply"}
    rank        1 is best; equal ranks are not paired
    structure   mean [8, 16, 16, 16] in .npz (TRELLIS's data tools), or a tensor in .pt, .npy or .safetensors
    latent      coords [v, 3] and feats [v, 8], not normalised, in .npz or .safetensors
    asset       a .ply of Gaussians, for what is not given; encoding it for the second stage needs DINOv2 on
                this machine
DSO's folder, anywhere below the root (first stage alone):
    NNN_cond.pt  NNN_sparse_sample_MMM.pt
    model_info.npz with image_ids, glb_ids, angles (degrees of tilt once let go; of several columns, as of two
    simulations, the largest counts)

What `flow sample` writes has per condition and seed a .ply, the latents of both stages, and a line for the
ranked list.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from eg3d_rlhf.models.sparse import Latent, SparseSample, collate, feats_of, to_cpu
from eg3d_rlhf.tuning.flow.base.conditioning import Conditions, read_array, read_embedding
from eg3d_rlhf.tuning.flow.base.ranking import Candidate, Imported, file_of, pair_up, rank_of
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families.trellis_assets import read_ply
from eg3d_rlhf.tuning.flow.families.trellis_files import LATENT, STRUCTURE
from training.storage import write_atomic

STANDS = 20.0  # degrees of tilt below which DSO says that an asset stands


def candidate(record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
    """A line of a ranked list. Raises: ValueError, OSError for what does not fit."""
    condition = record.get("condition") if isinstance(record, dict) else None
    if not isinstance(condition, str) or not condition or not {STRUCTURE, LATENT, "asset"} & set(record):
        raise ValueError(
            f"expected a condition, a rank and structure, latent or asset, got {record!r:.120}. Write all of"
            " them."
        )
    rank = rank_of(record, ranked)
    latents: dict[str, Latent] = {}
    if STRUCTURE in record:
        latents[STRUCTURE] = read_structure(folder / record[STRUCTURE])
    if LATENT in record:
        coords, feats = (read_array(folder / record[LATENT], key) for key in ("coords", "feats"))
        if coords.ndim == 2 and coords.shape[1] == 4 and not coords[:, 0].any():
            coords = coords[:, 1:]  # of a batch of one
        sample = SparseSample(coords.int().contiguous(), feats.float())
        latents[LATENT] = SparseSample(sample.coords, pipeline.normalised(sample.feats))
    if "asset" in record:
        encoded = pipeline.encode([read_ply(folder / record["asset"])])[0]
        latents.update(
            {stage: to_cpu(encoded[stage]) for stage in (STRUCTURE, LATENT) if stage not in latents}
        )
    for stage, latent in latents.items():
        who = str(record.get(stage, record.get("asset")))
        stage_of(pipeline, stage).check(who, latent)
        if not torch.isfinite(feats_of(collate([latent]))).all():
            raise ValueError(
                f"{who}: expected finite latents, got others. Encode the asset again, or leave it out."
            )
    return Candidate(name=name, condition=condition, rank=rank, latents=latents, file=file_of(record, folder))


def read_structure(path: Path) -> torch.Tensor:
    """A structure's latent [C, R, R, R] from a file."""
    grid = read_array(path, "mean").float()
    return grid[0] if grid.ndim == 5 and len(grid) == 1 else grid


def read_dso(root: Path, pipeline: Any) -> Imported:
    """Pairs of the first stage from DSO's samples: an asset that stands (tilt below STANDS degrees) is
    preferred to one that falls.

    Where the table has several columns of angles, an asset stands only if it does in all. Samples without an
    angle, or with one that is not finite (a failed simulation), are left out and counted.
    Raises: FileNotFoundError or ValueError for files that are missing or do not fit.
    """
    tables = sorted(Path(root).rglob("model_info.npz"))
    if not tables:
        raise FileNotFoundError(
            f"DSO samples: expected model_info.npz at or below {root}, got none. Name the folder of the"
            " samples."
        )
    candidates: list[Candidate] = []
    tokens: dict[str, torch.Tensor] = {}
    left_out = 0
    for table in tables:
        try:
            with np.load(table) as file:
                images, samples, angles = (file[name] for name in ("image_ids", "glb_ids", "angles"))
                tilts = (
                    angles.max(1) if angles.ndim == 2 and len(angles) == images.size else angles.reshape(-1)
                )
                columns = [images.reshape(-1), samples.reshape(-1), tilts]
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{table}: expected plain arrays image_ids, glb_ids and angles, got: {error}. Write them so."
            ) from None
        if len({len(column) for column in columns}) != 1:
            raise ValueError(
                f"{table}: expected three arrays of one length, got {[len(c) for c in columns]}. Write the"
                " table again."
            )
        tilt = {
            (_plain(image), _plain(sample)): float(angle)
            for image, sample, angle in zip(*columns, strict=True)
        }
        prefix = "" if table.parent == Path(root) else f"{table.parent.relative_to(root).as_posix()}/"
        for path in sorted(table.parent.glob("*_sparse_sample_*.pt")):
            image, _, sample = path.stem.rpartition("_sparse_sample_")
            angle = tilt.get((_plain(image), _plain(sample)), math.nan)
            if not math.isfinite(angle):
                left_out += 1
                continue
            latent = read_structure(path)
            stage_of(pipeline, STRUCTURE).check(str(path), latent)
            name = prefix + image
            candidates.append(
                Candidate(
                    name=sample, condition=name, rank=float(angle >= STANDS), latents={STRUCTURE: latent}
                )
            )
            if name not in tokens:
                tokens[name] = read_embedding(table.parent / f"{image}_cond.pt")
    if not candidates:
        raise ValueError(
            "DSO samples: expected NNN_sparse_sample_MMM.pt beside model_info.npz, got none with an angle in"
            f" {root}."
        )
    pairs = pair_up(candidates)
    paired = {pair.condition for pair in pairs[STRUCTURE]}
    conditions = Conditions(tokens={k: v for k, v in tokens.items() if k in paired}, zero_null=True)
    report = {
        "assets": len(candidates),
        "without_angle": left_out,
        "one_sided": len(tokens) - len(paired),
        "pairs": len(pairs[STRUCTURE]),
    }
    return Imported(pairs=pairs, conditions=conditions, report=report)


def _plain(number: object) -> str:
    """One spelling for 7, "007" and "7"."""
    text = number.decode() if isinstance(number, bytes) else str(number)
    return str(int(text)) if text.isdecimal() else text


def write_latent(path: Path, pipeline: Any, latent: Latent) -> None:
    """A stage's latent of a drawn asset, as TRELLIS's data tools write it."""
    if isinstance(latent, SparseSample):
        tensors = {"coords": latent.coords, "feats": pipeline.unnormalised(latent.feats)}
    else:
        assert isinstance(latent, torch.Tensor)
        tensors = {"mean": latent}
    write_atomic(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
