"""Pairs written and read back to the bit; everything that does not fit together is refused by name."""

import hashlib
import json
import math
from dataclasses import fields, replace

import pytest
import torch

from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.models.sparse import SparseSample
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, pairs_hash, read_pairs, write_pairs
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid
from tests.rejections import raising
from tests.tuning.flow.closed_forms import PerChannel, dense, pair_of, stage_of, voxels

KINDS = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "voxels"])
META = {"seed": 3, "made by": {"network": "abc"}}


def some(sparse: bool = False, n: int = 5) -> list[PreferencePair]:
    extra = {
        "source": "loop",
        "reward_preferred": 0.1,
        "reward_rejected": -1.5,
        "w1": 0.25,
        "w2": 1.125,
        "provenance": {"seed": 7},
    }
    return [pair_of(i, sparse, **(extra if i % 2 else {})) for i in range(n)]


def parts(latent) -> list[torch.Tensor]:
    return [latent.coords, latent.feats] if isinstance(latent, SparseSample) else [latent]


def assert_same(a: PreferencePair, b: PreferencePair) -> None:
    for name in (f.name for f in fields(PreferencePair)):
        x = getattr(a, name)
        y = getattr(b, name)
        if name in ("preferred", "rejected"):
            assert all(
                torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(parts(x), parts(y), strict=True)
            )
        else:
            assert x == y, name


@KINDS
@pytest.mark.parametrize("shard_bytes", [10**9, 1200, 1], ids=["one shard", "some", "a shard each"])
def test_pairs_come_back_to_the_bit(tmp_path, sparse, shard_bytes):
    pairs = some(sparse)
    pairs[3] = replace(pairs[3], rejected=pairs[1].preferred)  # stored once
    digest = write_pairs(tmp_path, pairs, META, shard_bytes)
    back, meta = read_pairs(tmp_path, stage_of(PerChannel(), sparse))
    assert meta == META and len(back) == 5
    for a, b in zip(pairs, back, strict=True):
        assert_same(a, b)
    assert back[3].rejected is back[1].preferred
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert 1 <= shards <= 9 and shards == {10**9: 1, 1: 9}.get(shard_bytes, shards)
    assert write_pairs(tmp_path / "again", back, META, shard_bytes) == digest == pairs_hash(tmp_path)


def test_the_hash_tells_pairs_apart(tmp_path):
    pairs = some()
    changed = [replace(pairs[0], preferred=pairs[0].preferred + 1e-6), *pairs[1:]]
    weighed = [replace(pairs[0], w2=1.5), *pairs[1:]]
    sets = [
        (pairs, META),
        (changed, META),
        (weighed, META),
        (pairs[::-1], META),
        (pairs, {**META, "seed": 4}),
    ]
    assert len({write_pairs(tmp_path / str(i), p, m) for i, (p, m) in enumerate(sets)}) == len(sets)


def test_a_second_writing_replaces_the_first_whole(tmp_path):
    write_pairs(tmp_path, some(n=5), META, 1)
    write_pairs(tmp_path, some(n=2), META, 1)
    assert len(read_pairs(tmp_path)[0]) == 2 and len(list(tmp_path.glob("latents-*"))) == 4
    read, _ = read_pairs(tmp_path)
    write_pairs(tmp_path, read, {}, 1)  # the latents may still be read from the files that go
    assert_same(read_pairs(tmp_path)[0][1], some(n=2)[1])


def test_a_writing_that_was_interrupted_is_no_set(tmp_path, monkeypatch):
    write_pairs(tmp_path, some(), META)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("eg3d_rlhf.tuning.flow.base.pairs.write_atomic", stop)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path, some(n=2), META)
    with raising(str(tmp_path), "meta.json", kind=FileNotFoundError):
        read_pairs(tmp_path)


def test_pairs_of_another_stage_are_refused(tmp_path):
    write_pairs(tmp_path, some(), META)
    read_pairs(tmp_path, "structure")
    with raising(str(tmp_path), "'voxels'", "'structure'"):
        read_pairs(tmp_path, "voxels")
    larger = stage_of(PerChannel())
    larger.latents = DenseGrid(channels=2, resolution=8)
    with raising("'pair-0'", "preferred", "[2, 8, 8, 8]", "[2, 4, 4, 4]"):
        read_pairs(tmp_path, larger)
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with raising("write_pairs", "structure", "voxels"):
        write_pairs(tmp_path, [pair_of(0), pair_of(1, True)], META)
    with raising("write_pairs"):
        write_pairs(tmp_path, [], META)
    with raising("write_pairs", "1", "'pair-0'"):
        write_pairs(tmp_path, [pair_of(0)] * 2, META)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_missing_and_damaged_files_are_named(tmp_path):
    write_pairs(tmp_path, some(), META, 3000)
    shard = tmp_path / "latents-001.safetensors"
    rows = tmp_path / "pairs.jsonl"
    meta = tmp_path / "meta.json"
    kept = {path: path.read_bytes() for path in (shard, rows, meta)}
    for path, damage, error, names in (
        (shard, None, FileNotFoundError, ("latents-001.safetensors",)),
        (shard, lambda b: b[:-3], ValueError, ("latents-001.safetensors", "meta.json")),
        (shard, lambda b: b[:-8] + b"\0" * 8, ValueError, ("latents-001.safetensors", "meta.json")),
        (rows, None, FileNotFoundError, ("pairs.jsonl", "5")),
        (rows, lambda b: b.replace(b"shape-1", b"shape-2"), ValueError, ("pairs.jsonl", "meta.json")),
        (meta, lambda b: b.replace(b'"seed": 3', b'"seed": 4'), ValueError, ("meta.json: ",)),
        (meta, lambda b: b[:40], ValueError, ("meta.json: ",)),
        (meta, lambda b: b"[]", ValueError, ("meta.json: ",)),
    ):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(kept[path]))
        with raising(*names, kind=error):
            read_pairs(tmp_path)
        path.write_bytes(kept[path])
    assert len(read_pairs(tmp_path)[0]) == 5


def forge(folder, change) -> None:
    """Rewrite a folder's records, with hashes that fit."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    change(rows)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "pairs.jsonl").write_bytes(data)
    content = json.loads((folder / "meta.json").read_text())
    content["records"] = hashlib.sha256(data).hexdigest()
    content["hash"] = json_hash({k: v for k, v in content.items() if k != "hash"})
    (folder / "meta.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda rows: rows[0].update(preferred="000099"), ("pairs.jsonl", "'000099'")),
        (lambda rows: rows[0].update(winner=1), ("pairs.jsonl", "'winner'")),
        (lambda rows: rows[0].pop("condition"), ("pairs.jsonl", "'condition'")),
        (lambda rows: rows[1].update(id="pair-0"), ("pairs.jsonl", "1", "'pair-0'")),
        (lambda rows: rows[0].update(w2=-1.0), ("'pair-0'", "w2", "-1.0")),
        (lambda rows: rows[0].update(stage="slat"), ("'structure'", "pair-0", "'slat'")),
        (lambda rows: rows[0].update(source="model"), ("source", "human", "loop", "'model'")),
    ],
)
def test_records_that_make_no_pairs_are_refused(tmp_path, change, names):
    write_pairs(tmp_path, some(), META)
    forge(tmp_path, change)
    with raising(*names):
        read_pairs(tmp_path)


def test_latents_that_are_not_finite_make_no_pair():
    bad = dense(0)
    bad[0, 1, 2, 3] = math.inf
    with raising("'pair-0'", "rejected", "1 of 128"):
        pair_of(0, rejected=bad)
    sparse = voxels(0)
    with raising("preferred", "18 of 18"):
        pair_of(0, True, preferred=SparseSample(sparse.coords, sparse.feats * math.nan))


def test_pairs_that_do_not_match_are_refused():
    with raising("[2, 4, 4, 4]", "voxels", "2 channels"):
        pair_of(0, rejected=voxels(0))
    with raising("[2, 4, 4, 4]", "[1, 4, 4, 4]"):
        pair_of(0, rejected=dense(0)[:1])
    with raising("preferred", "voxel", "1"):
        pair_of(0, True, preferred=SparseSample(torch.tensor([[0, 0, 1], [0, 0, 1]]), torch.zeros(2, 2)))
    with raising("reward_preferred", "nan"):
        pair_of(0, reward_preferred=math.nan)
