"""Preference pairs of TRELLIS's latents from a ranked list of assets, or from a folder of DSO's samples.

Ranked list: JSON lines, one per asset, with paths relative to the list:
    {"condition": "a red chair", "rank": 1, "structure": "ss_latents/0a.npz", "latent": "latents/0a.npz"}
    {"condition": "a red chair", "rank": 2, "asset": "0b.ply"}
    rank        1 is best; assets of equal rank are not paired
    structure   mean [8, 16, 16, 16] in .npz (TRELLIS's data tools), or a tensor in .pt, .npy or .safetensors
    latent      coords [v, 3] and feats [v, 8], not normalised, in .npz or .safetensors
    asset       a .ply of Gaussians, from which missing latents are encoded; encoding it for the second stage
                needs DINOv2 on this machine

Folder of DSO's samples, anywhere below the root (first stage only):
    NNN_cond.pt  NNN_sparse_sample_MMM.pt
    model_info.npz with image_ids, glb_ids and angles (degrees of tilt after the simulation; of several
    columns, as of two simulations, the largest counts)

`flow sample` writes a .ply, the latents of both stages and a line of the ranked list per prompt and seed.
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

STANDS = 20.0  # degrees of tilt below which an asset counts as standing in DSO


def candidate(record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
    """Read a line of a ranked list. Raises: ValueError or OSError for content that does not fit."""
    condition = record.get("condition") if isinstance(record, dict) else None
    if not isinstance(condition, str) or not condition or not {STRUCTURE, LATENT, "asset"} & set(record):
        raise ValueError(
            f"expected the keys condition, rank, and structure, latent or asset, got {record!r:.120}. Write"
            " all of them."
        )
    rank = rank_of(record, ranked)
    latents: dict[str, Latent] = {}
    if STRUCTURE in record:
        latents[STRUCTURE] = read_structure(folder / record[STRUCTURE])
    if LATENT in record:
        coords, feats = (read_array(folder / record[LATENT], key) for key in ("coords", "feats"))
        # Coordinates of a batch of one have the sample's number, 0, in front.
        if coords.ndim == 2 and coords.shape[1] == 4 and not coords[:, 0].any():
            coords = coords[:, 1:]
        sample = SparseSample(coords.int().contiguous(), feats.float())
        latents[LATENT] = SparseSample(sample.coords, pipeline.normalised(sample.feats))
    if "asset" in record:
        # Encoding is lazy: only the latents that the line does not give are computed.
        encoded = pipeline.encode([read_ply(folder / record["asset"])])[0]
        latents.update(
            {stage: to_cpu(encoded[stage]) for stage in (STRUCTURE, LATENT) if stage not in latents}
        )
    for stage, latent in latents.items():
        who = str(record.get(stage, record.get("asset")))
        stage_of(pipeline, stage).check(who, latent)
        if not torch.isfinite(feats_of(collate([latent]))).all():
            raise ValueError(
                f"{who}: the latents hold NaN or infinite values. Encode the asset again, or leave it out."
            )
    return Candidate(name=name, condition=condition, rank=rank, latents=latents, file=file_of(record, folder))


def read_structure(path: Path) -> torch.Tensor:
    """Read a structure's latent [C, R, R, R] from a file."""
    grid = read_array(path, "mean").float()
    # Files may hold a batch of one.
    return grid[0] if grid.ndim == 5 and len(grid) == 1 else grid


def read_dso(root: Path, pipeline: Any) -> Imported:
    """Read pairs of the first stage from DSO's samples: a standing asset is preferred to a falling one.

    An asset stands if its tilt is below STANDS degrees, in all columns if the table has several. Samples
    without a finite angle, as after a failed simulation, are left out and counted.

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
                # Several columns are several simulations; the worst one counts.
                tilts = (
                    angles.max(1) if angles.ndim == 2 and len(angles) == images.size else angles.reshape(-1)
                )
                columns = [images.reshape(-1), samples.reshape(-1), tilts]
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{table}: expected the arrays image_ids, glb_ids and angles, got: {error}. Write the table"
                " again."
            ) from None
        if len({len(column) for column in columns}) != 1:
            raise ValueError(
                f"{table}: expected three arrays of one length, got {[len(c) for c in columns]}. Write the"
                " table again."
            )
        tilt = {
            (_canonical(image), _canonical(sample)): float(angle)
            for image, sample, angle in zip(*columns, strict=True)
        }
        # Images of several tables may have the same number, so prompts are named by their folder, too.
        prefix = "" if table.parent == Path(root) else f"{table.parent.relative_to(root).as_posix()}/"
        for path in sorted(table.parent.glob("*_sparse_sample_*.pt")):
            image, _, sample = path.stem.rpartition("_sparse_sample_")
            angle = tilt.get((_canonical(image), _canonical(sample)), math.nan)
            if not math.isfinite(angle):
                left_out += 1
                continue
            latent = read_structure(path)
            stage_of(pipeline, STRUCTURE).check(str(path), latent)
            name = prefix + image
            candidates.append(
                Candidate(
                    # Rank 0 stands, rank 1 falls
                    name=sample,
                    condition=name,
                    rank=float(angle >= STANDS),
                    latents={STRUCTURE: latent},
                )
            )
            if name not in tokens:
                tokens[name] = read_embedding(table.parent / f"{image}_cond.pt")
    if not candidates:
        raise ValueError(
            f"DSO samples: {root} holds no NNN_sparse_sample_MMM.pt with an angle in model_info.npz. Name the"
            " folder of the samples."
        )
    pairs = pair_up(candidates)
    # Images of which all samples stand, or all fall, give no pair.
    paired = {pair.condition for pair in pairs[STRUCTURE]}
    conditioning = Conditions(tokens={k: v for k, v in tokens.items() if k in paired}, zero_null=True)
    report = {
        "assets": len(candidates),
        "without_angle": left_out,
        "one_sided": len(tokens) - len(paired),
        "pairs": len(pairs[STRUCTURE]),
    }
    return Imported(pairs=pairs, conditions=conditioning, report=report)


def _canonical(number: object) -> str:
    """Return one spelling for 7, "007" and "7"."""
    text = number.decode() if isinstance(number, bytes) else str(number)
    return str(int(text)) if text.isdecimal() else text


def write_latent(path: Path, pipeline: Any, latent: Latent) -> None:
    """Write a stage's latent of a sampled asset in the format of TRELLIS's data tools."""
    if isinstance(latent, SparseSample):
        # TRELLIS's tools expect latents that are not normalised.
        tensors = {"coords": latent.coords, "feats": pipeline.unnormalised(latent.feats)}
    else:
        assert isinstance(latent, torch.Tensor)
        tensors = {"mean": latent}
    write_atomic(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
