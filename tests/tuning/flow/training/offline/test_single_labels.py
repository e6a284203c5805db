"""Test labelled assets from a list and a file, from the ranks of a list, and from the toy's simulated
annotators.
"""

import json

import pytest
import torch

from eg3d_rlhf.models.sparse import collate, feats_of
from eg3d_rlhf.preferences.label_scores import goodness_from_ranks, goodness_from_votes
from eg3d_rlhf.tuning.flow.base.ranking import write_latents
from eg3d_rlhf.tuning.flow.base.single_labels import read_labelled
from eg3d_rlhf.tuning.flow.toy.toy_oracles import LabelOracle, simulated_singles
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import TRAINED, ToyPipeline
from tests.rejections import raising
from tests.tuning.flow.tiny_flow import TinyPipeline, structure_pairs, voxel_pairs


@pytest.fixture
def folder(tmp_path):
    """Return a folder with six sampled assets of two prompts, as `flow sample` writes it."""
    rows = []
    for i, (one, other) in enumerate(zip(structure_pairs(6), voxel_pairs(6), strict=True)):
        write_latents(tmp_path / f"{i}.safetensors", {"structure": one.preferred, "voxels": other.preferred})
        rows.append(
            {
                "condition": "ab"[i % 2],
                "rank": None,
                "latents": f"{i}.safetensors",
                "seed": i,
                "look_at": f"{i}.ply",
            }
        )
    (tmp_path / "ranking.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_file_of_labels_names_what_people_looked_at(folder):
    said = {"0.ply": True, "2.ply": False, "4.ply": True, "1.ply": True, "3.ply": False}
    labels = folder / "thumbs.jsonl"
    labels.write_text(
        "".join(json.dumps({"asset": name, "thumb": good}) + "\n" for name, good in said.items())
    )
    found = read_labelled(folder, labels, TinyPipeline())
    expected = goodness_from_votes(
        [("000001", True), ("000003", False), ("000005", True)]
    ) | goodness_from_votes([("000002", True), ("000004", False)])
    assert found.goodness == pytest.approx(expected) and len(found.assets) == 6
    singles = found.singles("voxels")
    assert [one.id for one in singles] == ["a/000001", "b/000002", "a/000003", "b/000004", "a/000005"]
    assert torch.equal(feats_of(singles[3].latent), feats_of(voxel_pairs(6)[3].preferred))
    assert singles[3].r == pytest.approx(expected["000004"])
    assert {one.condition for one in found.singles("structure", ["b"])} == {"b"}
    turned = found.singles("voxels", label_use="inverted")
    assert [one.r for one in turned] == pytest.approx([1 - one.r for one in singles])


def test_without_labels_the_lists_own_ranks_count(folder):
    path = folder / "ranking.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "rank": 1 + i // 2}) + "\n" for i, row in enumerate(rows)))
    assert read_labelled(folder, None, TinyPipeline()).goodness == goodness_from_ranks(
        {"000001": 1, "000003": 2, "000005": 3}
    ) | goodness_from_ranks({"000002": 1, "000004": 2, "000006": 3})


def test_what_is_rejected(folder):
    labels = folder / "labels.jsonl"
    pipeline = TinyPipeline()
    with raising("ranking.jsonl, line 1", "thumb", "label", "score", "rank"):
        read_labelled(folder, None, pipeline)
    labels.write_text('{"asset": "7.ply", "thumb": true}\n')
    with raising("labels.jsonl, line 1", "6", "7.ply"):
        read_labelled(folder, labels, pipeline)
    labels.write_text('{"asset": "0.ply", "thumb": true}\n{"asset": "2.ply", "thumb": false}\n')
    found = read_labelled(folder, labels, pipeline)
    with raising("labels: ", "2 labels"):
        found.singles("voxels", ["b"])
    with raising("'texture'", "structure", "voxels"):
        found.singles("texture")
    with raising(str(folder / "nowhere.jsonl"), kind=FileNotFoundError):
        read_labelled(folder / "nowhere.jsonl", labels, pipeline)


def test_the_toys_people_prefer_what_the_oracle_does_and_see_the_same_assets():
    thumbs, ranks = (simulated_singles(kind, TRAINED[:6], 40, seed=3) for kind in ("thumbs", "ranks"))
    assert thumbs.identity != ranks.identity == simulated_singles("ranks", TRAINED[:6], 40, seed=3).identity
    for stage in ("structure", "voxels"):
        both = zip(thumbs.assets, ranks.assets, strict=True)
        assert all(torch.equal(feats_of(a.latents[stage]), feats_of(b.latents[stage])) for a, b in both)
    decode = ToyPipeline(torch.nn.Identity(), torch.nn.Identity()).decode
    names = [asset.condition for asset in thumbs.assets]
    scores = LabelOracle()(decode(collate([asset.latents["voxels"] for asset in thumbs.assets])), names).view(
        6, 40
    )
    for labelled, least in ((thumbs, 0.45), (ranks, 0.7)):
        r = torch.tensor([labelled.goodness[asset.name] for asset in labelled.assets]).view(6, 40)
        found = [float(torch.corrcoef(torch.stack(both))[0, 1]) for both in zip(r, scores, strict=True)]
        assert min(found) > least, found
        assert r.mean(1) == pytest.approx(torch.full([6], 0.5), abs=1e-5)
