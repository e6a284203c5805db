"""Pairs from a ranked list of assets, and from samples as the DSO project writes them."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.base.conditioning import read_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import read_pairs
from eg3d_rlhf.tuning.flow.base.ranking import Candidate, pair_up
from eg3d_rlhf.tuning.flow.base.ranking import read_ranking as read_any_ranking
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION
from eg3d_rlhf.tuning.flow.families import trellis_pairs as pair_import
from eg3d_rlhf.tuning.flow.families.trellis_assets import write_ply
from eg3d_rlhf.tuning.flow.families.trellis_files import LATENT, STRUCTURE
from eg3d_rlhf.tuning.flow.families.trellis_pairs import read_dso
from tests.rejections import raising
from tests.tuning.flow.families.trellis.tiny_trellis import E, voxels, write_imported

read_ranking = partial(read_any_ranking, make_candidate=pair_import.candidate)


def candidates(*ranks, condition="c"):
    latents = [{STRUCTURE: torch.full([2, 4, 4, 4], float(i))} for i in range(len(ranks))]
    return [
        Candidate(name=str(i), condition=condition, rank=r, latents=latents[i]) for i, r in enumerate(ranks)
    ]


def test_only_unequal_ranks_are_paired():
    pairs = pair_up(candidates(1, 2, 2, 5))[STRUCTURE]
    assert [p.id for p in pairs] == [f"c/{name}" for name in ("0>1", "0>2", "0>3", "1>3", "2>3")]
    assert all(
        float(p.preferred.mean()) == int(p.id[2]) and p.provenance["ranks"][0] < p.provenance["ranks"][1]
        for p in pairs
    )


def test_rankings_without_a_preference_are_rejected():
    with raising("rank", "3"):
        pair_up(candidates(2, 2) + candidates(1, condition="d"))


@pytest.fixture
def ranked(tmp_path):
    """Write three assets of one prompt in the files of TRELLIS's data tools."""
    rows = []
    for i in range(3):
        np.savez(tmp_path / f"s{i}.npz", mean=np.full([2, 4, 4, 4], i, np.float32))
        np.savez(
            tmp_path / f"l{i}.npz",
            coords=voxels(i).numpy().astype(np.uint8),
            feats=np.full([40, 4], i, np.float32),
        )
        rows.append(
            {"condition": "a red chair", "rank": 3 - i, "structure": f"s{i}.npz", "latent": f"l{i}.npz"}
        )
    return tmp_path, rows


def write_list(folder, rows):
    path = folder / "ranking.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_ranked_list(ranked, pipeline, tmp_path):
    folder, rows = ranked
    imported = read_ranking(write_list(folder, rows), pipeline)
    assert imported.report == {"assets": 3, "pairs": {STRUCTURE: 3, LATENT: 3}}
    hashes = write_imported(tmp_path / "pairs", imported, pipeline.file)
    assert hashes == write_imported(
        tmp_path / "again", read_ranking(folder / "ranking.jsonl", pipeline), pipeline.file
    )
    for stage in pipeline.stages:
        pairs, meta = read_pairs(tmp_path / "pairs" / stage.name, stage)
        assert [p.id for p in pairs] == [
            f"a red chair/{name}" for name in ("000003>000002", "000003>000001", "000002>000001")
        ]
        assert meta["convention"] == CONVENTION
    # of the second stage
    best = pairs[1].preferred
    worst = pairs[1].rejected
    assert torch.equal(best.coords, voxels(2)) and best.coords.dtype == torch.int32
    assert torch.allclose(pipeline.unnormalised(best.feats), torch.full([40, 4], 2.0), atol=1e-5)
    assert torch.allclose(pipeline.unnormalised(worst.feats), torch.zeros(40, 4), atol=1e-5)
    assert meta["normalization"] == {"mean": [-2.0, 0.5, 0.0, 1.0], "std": [2.0, 1.5, 0.5, 1.0]}


def test_other_forms_of_the_same_latents(ranked, pipeline):
    folder, rows = ranked
    torch.save(torch.full([1, 2, 4, 4, 4], 1.0, dtype=torch.float16), folder / "s.pt")
    coords = torch.nn.functional.pad(voxels(1), (1, 0))
    save_file({"coords": coords, "feats": torch.full([40, 4], 1.0)}, folder / "l.safetensors")
    rows[0] |= {"structure": "s.pt", "latent": "l.safetensors"}
    for row, rank in zip(rows, (1, 1, 2), strict=True):
        row["rank"] = rank
    imported = read_ranking(write_list(folder, rows), pipeline)
    first = imported.pairs[LATENT][0].preferred
    second = imported.pairs[LATENT][1].preferred
    assert torch.equal(first.coords, second.coords) and torch.equal(first.feats, second.feats)
    assert torch.equal(imported.pairs[STRUCTURE][0].preferred, imported.pairs[STRUCTURE][1].preferred)


def test_assets_are_encoded(ranked, pipeline, monkeypatch):
    folder, rows = ranked
    (asset,) = pipeline.decode(SparseBatch.join([SparseSample(voxels(7, 60), torch.zeros(60, 4))]))
    write_ply(folder / "a.ply", asset)
    for row in rows:
        row["asset"] = row.pop("structure") and "a.ply"
    imported = read_ranking(write_list(folder, rows), pipeline)
    assert set(imported.pairs) == {STRUCTURE, LATENT}
    expected = pipeline.encode([asset])[0][STRUCTURE]
    assert torch.allclose(imported.pairs[STRUCTURE][0].preferred, expected, atol=1e-5)
    for row in rows:
        del row["latent"]
    with raising("ranking.jsonl, line 1", "dinov2_vitl14_reg"):
        read_ranking(write_list(folder, rows), pipeline)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"rank": None}, ("rank", "None")),
        ({"rank": math.nan}, ("rank", "nan")),
        ({"condition": ""}, ("condition",)),
        ({"structure": "none.npz"}, ("none.npz",)),
        ({"structure": "l1.npz"}, ("l1.npz", "mean", "'coords', 'feats'")),
        ({"structure": "small.npz"}, ("small.npz", "[2, 4, 4, 4]", "[2, 2, 2, 2]")),
        ({"structure": "nan.npz"}, ("nan.npz",)),
        ({"latent": "far.npz"}, ("far.npz", "0 to 7", "0 to 8")),
    ],
)
def test_unsuitable_lists_are_rejected(ranked, pipeline, change, names):
    folder, rows = ranked
    np.savez(folder / "small.npz", mean=np.zeros([2, 2, 2, 2], np.float32))
    np.savez(folder / "nan.npz", mean=np.full([2, 4, 4, 4], np.nan, np.float32))
    np.savez(folder / "far.npz", coords=np.array([[0, 0, 8]], np.uint8), feats=np.zeros([1, 4], np.float32))
    rows[1] |= change
    with raising("line 2", *names):
        read_ranking(write_list(folder, rows), pipeline)


def test_lists_with_holes_and_no_lists(ranked, pipeline):
    folder, rows = ranked
    del rows[2]["latent"]
    with raising("ranking.jsonl", "'latent'"):
        read_ranking(write_list(folder, rows), pipeline)
    with raising(str(folder / "none.jsonl"), kind=FileNotFoundError):
        read_ranking(folder / "none.jsonl", pipeline)


@pytest.fixture
def samples(tmp_path):
    """Write two images with three samples each, a failed simulation, and an image whose samples all stand."""
    table = {"image_ids": [], "glb_ids": [], "angles": []}
    for image in range(3):
        torch.save(
            torch.full([1, 3, E], float(image), dtype=torch.bfloat16), tmp_path / f"{image:03d}_cond.pt"
        )
        for sample in range(3):
            torch.save(
                torch.full([1, 2, 4, 4, 4], image + sample / 10),
                tmp_path / f"{image:03d}_sparse_sample_{sample:03d}.pt",
            )
            table["image_ids"].append(image)
            table["glb_ids"].append(sample)
            table["angles"].append(3.0 if image == 2 else [5.0, 90.0, math.nan if image else 19.9][sample])
    np.savez(tmp_path / "model_info.npz", **{k: np.array(v) for k, v in table.items()})
    return tmp_path


def test_samples_of_dso(samples, pipeline, tmp_path):
    imported = read_dso(samples, pipeline)
    assert list(imported.pairs) == [STRUCTURE]
    assert [p.id for p in imported.pairs[STRUCTURE]] == ["000/000>001", "000/002>001", "001/000>001"]
    assert imported.report == {"assets": 8, "without_angle": 1, "one_sided": 1, "pairs": 3}
    assert imported.conditioning.names == ("000", "001") and not imported.conditioning.null(1).any()
    write_imported(tmp_path / "out", imported, pipeline.file)
    assert torch.equal(
        read_conditioning(tmp_path / "out" / "conditioning.safetensors").select(["001"]), torch.ones(1, 3, E)
    )
    assert len(read_pairs(tmp_path / "out" / STRUCTURE, pipeline.stages[0])[0]) == 3


def test_the_larger_of_two_columns_of_angles_counts(samples, pipeline):
    """An asset stands if it stands in both simulations; one that failed in either has no angle."""
    table = dict(np.load(samples / "model_info.npz"))
    single_column = read_dso(samples, pipeline)
    angles = table.pop("angles")
    np.savez(samples / "model_info.npz", angles=angles[:, None], **table)
    assert read_dso(samples, pipeline).report == single_column.report
    other = np.zeros_like(angles)
    other[[2, 3]] = 45, math.nan  # image 0, sample 2; image 1, sample 0
    for columns in ([angles, other], [other, angles]):
        np.savez(samples / "model_info.npz", angles=np.stack(columns, 1), **table)
        both = read_dso(samples, pipeline)
        assert [p.id for p in both.pairs[STRUCTURE]] == ["000/000>001", "000/000>002"] and both.report[
            "without_angle"
        ] == 2


def test_samples_in_folders_below_keep_their_names_apart(samples, pipeline, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "all" / name).mkdir(parents=True)
        for path in samples.glob("*.[np][pt]*"):
            (tmp_path / "all" / name / path.name).write_bytes(path.read_bytes())
    imported = read_dso(tmp_path / "all", pipeline)
    assert (
        imported.conditioning.names == ("a/000", "a/001", "b/000", "b/001")
        and len(imported.pairs[STRUCTURE]) == 6
    )


def test_unsuitable_samples_of_dso_are_rejected(samples, pipeline, tmp_path):
    (samples / "000_cond.pt").unlink()
    with raising("000_cond.pt", kind=FileNotFoundError):
        read_dso(samples, pipeline)
    np.savez(samples / "model_info.npz", image_ids=np.zeros(2), glb_ids=np.zeros(1), angles=np.zeros(1))
    with raising("model_info.npz", "[2, 1, 1]"):
        read_dso(samples, pipeline)
    np.savez(samples / "model_info.npz", image_ids=np.zeros(1))
    with raising("model_info.npz", "image_ids", "glb_ids", "angles"):
        read_dso(samples, pipeline)
    with raising("DSO", "model_info.npz", str(tmp_path / "none"), kind=FileNotFoundError):
        read_dso(tmp_path / "none", pipeline)


def test_votes_replace_ranks():
    """The majority decides; ties and pairs across prompts make no pair."""
    others = candidates(0, condition="d")
    ballots = {("1", "0"): (2, 1), ("2", "3"): (1, 1), ("0", "2"): (1, 0)}

    def votes(a, b):
        return ballots.get((a.name, b.name)) or ballots.get((b.name, a.name), (0, 0))[::-1]

    pairs = pair_up([*candidates(0, 0, 0, 0), *others], count_votes=votes)[STRUCTURE]
    assert {p.id: p.provenance["votes"] for p in pairs} == {"c/1>0": [2, 1], "c/0>2": [1, 0]}
    assert all(float(p.preferred.mean()) == int(p.id[2]) for p in pairs)
    with raising("votes", "2"):
        pair_up(candidates(0, 0, 0, 0)[2:], count_votes=votes)
