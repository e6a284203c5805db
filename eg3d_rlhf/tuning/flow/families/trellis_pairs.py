"""Preference pairs of TRELLIS's latents from a ranked list of assets, or from a folder of DSO's samples.

Ranked list: a file of JSON lines, one line per asset, with paths relative to the file:
    {"condition": "a red chair", "rank": 1, "structure": "ss_latents/0a.npz", "latent": "latents/0a.npz"}
    {"condition": "a red chair", "rank": 2, "asset": "0b.ply"}
    rank        rank among the assets of a prompt; 1 is best, and assets of equal rank are not paired
    structure   file of the first stage's latent: array "mean" [8, 16, 16, 16] in .npz (the format of
                TRELLIS's data tools), or a tensor in .pt, .npy or .safetensors
    latent      file of the second stage's latent: coords [v, 3] and feats [v, 8], not normalised, for v
                voxels, in .npz or .safetensors
    asset       .ply file of Gaussians. A latent that has no file of its own is encoded from it; encoding for
                the second stage needs DINOv2 on this machine

Folder of samples of DSO (Li et al. 2025, Direct Simulation Optimization), anywhere below the root. The
samples are of the first stage only:
    NNN_cond.pt                  conditioning tokens of image NNN
    NNN_sparse_sample_MMM.pt     structure of sample MMM of image NNN
    model_info.npz               arrays image_ids, glb_ids (ids of samples) and angles, the tilt in degrees
                                 after a simulation; if there are several columns, the largest tilt counts

For each prompt and seed, `flow sample` writes a .ply file, the latents of both stages and a line of the
ranked list.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from eg3d_rlhf.models.sparse import Latent, SparseSample, collate, feats_of, to_cpu
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, read_array, read_embedding
from eg3d_rlhf.tuning.flow.base.ranking import Candidate, Imported, file_of, pair_up, rank_of
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.families.trellis_assets import read_ply
from eg3d_rlhf.tuning.flow.families.trellis_files import LATENT, STRUCTURE
from training.storage import write_atomic

LARGEST_STANDING_TILT = 20.0  # degrees; an asset with a smaller tilt counts as standing, as in DSO


def candidate(record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
    """Convert a line of a ranked list to a candidate: an asset's latents with its prompt and its rank.

    The module's docstring explains the keys of a line.

    Args:
        record: content of the line.
        name: name of the asset.
        folder: folder to which the paths of the line are relative.
        pipeline: pipeline that encodes assets and checks latents.
        ranked: True if the line must have a rank.
    Raises: ValueError for missing keys, or latents that do not fit the pipeline; OSError for missing files.
    """
    condition = record.get("condition") if isinstance(record, dict) else None
    if not isinstance(condition, str) or not condition or not {STRUCTURE, LATENT, "asset"} & set(record):
        raise ValueError(
            "a line of a ranked list needs a key 'condition', the name of the prompt, and at least one of the"
            f" keys 'structure', 'latent' and 'asset', got {record!r:.120}. Add these keys to the line."
        )
    rank = rank_of(record, ranked)
    latents: dict[str, Latent] = {}
    if STRUCTURE in record:
        latents[STRUCTURE] = read_structure(folder / record[STRUCTURE])
    if LATENT in record:
        coords, feats = (
            read_array(folder / record[LATENT], array_name) for array_name in ("coords", "feats")
        )
        # In the format of a batch, each row begins with the sample's index, here 0. It is removed.
        if coords.ndim == 2 and coords.shape[1] == 4 and not coords[:, 0].any():
            coords = coords[:, 1:]
        sample = SparseSample(coords.int().contiguous(), feats.float())
        latents[LATENT] = SparseSample(sample.coords, pipeline.normalised(sample.feats))
    if "asset" in record:
        # Encoding is lazy: only the latents that the line does not name are computed.
        encoded_latents = pipeline.encode([read_ply(folder / record["asset"])])[0]
        latents.update(
            {stage: to_cpu(encoded_latents[stage]) for stage in (STRUCTURE, LATENT) if stage not in latents}
        )
    for stage, latent in latents.items():
        file_name = str(record.get(stage, record.get("asset")))
        stage_of(pipeline, stage).check(file_name, latent)
        if not torch.isfinite(feats_of(collate([latent]))).all():
            raise ValueError(
                f"{file_name}: the latents contain NaN or infinite values. Encode the asset again, or remove"
                " its line from the ranked list."
            )
    return Candidate(name=name, condition=condition, rank=rank, latents=latents, file=file_of(record, folder))


def read_structure(path: Path) -> torch.Tensor:
    """Read a structure's latent [C, R, R, R] from a file."""
    grid = read_array(path, "mean").float()
    # Some files hold a batch of one sample, [1, C, R, R, R].
    return grid[0] if grid.ndim == 5 and len(grid) == 1 else grid


def read_dso(root: Path, pipeline: Any) -> Imported:
    """Read preference pairs of the first stage from samples of DSO.

    An asset that stands is preferred to an asset of the same image that falls. An asset stands if its tilt is
    below 20 degrees in all columns of the array "angles". Samples without a finite tilt, as after a failed
    simulation, are ignored and counted.

    Args:
        root: folder that has files model_info.npz at or below it.
        pipeline: pipeline whose first stage the samples must fit.
    Returns: pairs, conditioning of the paired images, and a report of the numbers of assets and pairs.
    Raises: FileNotFoundError if there is no model_info.npz; ValueError for a model_info.npz that cannot be
        read, a latent that does not fit the pipeline, or if no sample has a finite tilt.
    """
    tables = sorted(Path(root).rglob("model_info.npz"))
    if not tables:
        raise FileNotFoundError(
            f"DSO samples: no file model_info.npz was found at or below {root}. Pass the folder that"
            " DSO wrote, with one model_info.npz for each set of samples."
        )
    candidates: list[Candidate] = []
    tokens: dict[str, torch.Tensor] = {}
    without_angle_count = 0  # number of ignored samples
    for table in tables:
        try:
            with np.load(table) as arrays:
                image_ids, sample_ids, angles = (
                    arrays[array_name] for array_name in ("image_ids", "glb_ids", "angles")
                )
                # DSO does not document its second column. The largest tilt counts: all must be small.
                if angles.ndim == 2 and len(angles) == image_ids.size:
                    tilts = angles.max(1)
                else:
                    tilts = angles.reshape(-1)
                id_and_tilt_columns = [image_ids.reshape(-1), sample_ids.reshape(-1), tilts]
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{table}: the arrays image_ids, glb_ids and angles cannot be read ({error}). Write the table"
                " again with DSO."
            ) from None
        if len({len(column) for column in id_and_tilt_columns}) != 1:
            raise ValueError(
                f"{table}: image_ids, glb_ids and angles must have the same length, got"
                f" {[len(c) for c in id_and_tilt_columns]}. Write the table again with DSO."
            )
        tilt_by_ids = {
            (_canonical(image_id), _canonical(sample_id)): float(tilt)
            for image_id, sample_id, tilt in zip(*id_and_tilt_columns, strict=True)
        }
        # Images of several tables may have the same number, so prompts are named by their folder, too.
        prefix = "" if table.parent == Path(root) else f"{table.parent.relative_to(root).as_posix()}/"
        for path in sorted(table.parent.glob("*_sparse_sample_*.pt")):
            image_id, _, sample_id = path.stem.rpartition("_sparse_sample_")
            tilt = tilt_by_ids.get((_canonical(image_id), _canonical(sample_id)), math.nan)
            if not math.isfinite(tilt):
                without_angle_count += 1
                continue
            latent = read_structure(path)
            stage_of(pipeline, STRUCTURE).check(str(path), latent)
            prompt = prefix + image_id
            candidates.append(
                Candidate(
                    # Rank 0 (better) for a standing asset, rank 1 for a falling one.
                    name=sample_id,
                    condition=prompt,
                    rank=float(tilt >= LARGEST_STANDING_TILT),
                    latents={STRUCTURE: latent},
                )
            )
            if prompt not in tokens:
                tokens[prompt] = read_embedding(table.parent / f"{image_id}_cond.pt")
    if not candidates:
        raise ValueError(
            f"DSO samples: no sample below {root} can be used. {without_angle_count} files"
            " NNN_sparse_sample_MMM.pt were found, and none of them has a finite angle in the model_info.npz"
            " beside it. If no file was found, pass the folder of the samples; otherwise simulate the samples"
            " again with DSO."
        )
    pairs = pair_up(candidates)
    # Images of which all samples stand, or all fall, give no pair.
    paired_prompts = {pair.condition for pair in pairs[STRUCTURE]}
    conditioning = Conditioning(
        tokens={k: v for k, v in tokens.items() if k in paired_prompts}, zero_null=True
    )
    report = {
        "assets": len(candidates),
        "without_angle": without_angle_count,
        "one_sided": len(tokens) - len(paired_prompts),
        "pairs": len(pairs[STRUCTURE]),
    }
    return Imported(pairs=pairs, conditioning=conditioning, report=report)


def _canonical(raw_id: object) -> str:
    """Return an id as text without leading zeros, because 7, "007" and "7" are the same id."""
    id_text = raw_id.decode() if isinstance(raw_id, bytes) else str(raw_id)
    return str(int(id_text)) if id_text.isdecimal() else id_text


def write_latent(path: Path, pipeline: Any, latent: Latent) -> None:
    """Write the latent of a sampled asset as .safetensors, with the keys of TRELLIS's data tools.

    The keys are "coords" and "feats" for the second stage, and "mean" for the first.

    Args:
        path: path of the file.
        pipeline: pipeline that unnormalises latents of the second stage.
        latent: latent of either stage.
    """
    if isinstance(latent, SparseSample):
        # TRELLIS's tools expect latents that are not normalised.
        tensors = {"coords": latent.coords, "feats": pipeline.unnormalised(latent.feats)}
    else:
        assert isinstance(latent, torch.Tensor)
        tensors = {"mean": latent}
    write_atomic(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
