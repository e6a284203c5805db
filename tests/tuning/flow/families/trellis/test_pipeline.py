"""TRELLIS as a pipeline: from noise to assets and back, on its own files."""

import shutil
import subprocess
import sys

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, SparseVoxels
from eg3d_rlhf.tuning.flow.families import folder
from eg3d_rlhf.tuning.flow.families import trellis as module
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from eg3d_rlhf.tuning.flow.families.trellis_assets import SplatAsset
from eg3d_rlhf.tuning.flow.families.trellis_files import LATENT, STRUCTURE
from tests.rejections import raising
from tests.tuning.flow.families.trellis.tiny_trellis import NAMES, E, R, tokens, voxels


def latent(seed, count=20):
    return SparseSample(
        voxels(seed, count), torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    )


def test_stages_are_those_of_the_files(pipeline):
    first, second = pipeline.stages
    assert (first.name, first.latents) == (STRUCTURE, DenseGrid(channels=2, resolution=4))
    assert (second.name, second.latents) == (LATENT, SparseVoxels(channels=4, resolution=R))
    assert first.path == second.path == FlowPath() and first.sampling.cfg_strength == 2.0
    assert pipeline.conditioning(NAMES[:2], LATENT).shape == (2, 3, E) and pipeline.null_conditioning(
        4, STRUCTURE
    ).shape == (4, 3, E)


def test_from_noise_to_assets_and_back(pipeline):
    assets = generate(pipeline, NAMES[:2], [1, 2])
    again = generate(pipeline, NAMES[:2], [1, 2])
    assert all(isinstance(a, SplatAsset) for a in assets)
    assert all(torch.equal(a.means, b.means) for a, b in zip(assets, again, strict=True))
    for asset in assets:
        assert float(asset.means.abs().max()) <= 0.5 + 0.5 * 1.5 / R and float(asset.scales.min()) > 0
        assert float(asset.opacities.min()) >= 0 and float(asset.opacities.max()) <= 1
    for encoded in pipeline.encode(assets):
        assert set(encoded) == {STRUCTURE, LATENT} and len(encoded) == 2
        pipeline.stages[0].check("encoded", encoded[STRUCTURE])


def test_the_gap_is_the_sign_of_the_decoded_structure(pipeline):
    x_0 = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = pipeline.part("sparse_structure_decoder")(x_0)
    for sample, places in zip(logits, pipeline.advance(STRUCTURE, x_0), strict=True):
        assert torch.equal(places.long(), (sample[0] > 0).nonzero()) and places.dtype == torch.int32


def test_an_empty_structure_keeps_its_likeliest_voxel_and_a_notice_is_printed_once(
    pipeline, monkeypatch, capsys
):
    folder.notice_empty.cache_clear()
    logits = -torch.arange(1.0, 513).view(1, 1, 8, 8, 8)
    monkeypatch.setattr(pipeline, "part", lambda name: lambda x_0: logits)
    (places,) = pipeline.advance(STRUCTURE, torch.zeros(1, 2, 4, 4, 4))
    assert places.tolist() == [[0, 0, 0]] and "structure" in capsys.readouterr().err
    pipeline.advance(STRUCTURE, torch.zeros(1, 2, 4, 4, 4))
    assert not capsys.readouterr().err


def test_no_gradient_passes_the_gap_or_the_decoder(pipeline):
    x_0 = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    assert not any(places.requires_grad for places in pipeline.advance(STRUCTURE, x_0))
    batch = SparseBatch.join([latent(0)])
    (asset,) = pipeline.decode(batch.with_feats(batch.feats.requires_grad_()))
    assert not asset.means.requires_grad


def test_latents_are_normalised_only_for_the_flow(pipeline):
    feats = latent(3).feats
    assert torch.allclose(pipeline.normalised(pipeline.unnormalised(feats)), feats, atol=1e-6)
    assert torch.allclose(
        pipeline.normalised(torch.tensor([[-2.0, 2.0, 0.5, 1.0]])), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    )
    decoder = pipeline.part("slat_decoder_gs")
    seen = []
    decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].feats))
    pipeline.decode(SparseBatch.join([latent(3)]))
    assert torch.equal(seen[0], pipeline.unnormalised(feats))


def test_structures_are_encoded_from_the_voxels_filled(pipeline):
    (asset,) = pipeline.decode(SparseBatch.join([latent(4, 60)]))
    encoded = pipeline.encode([asset])[0][STRUCTURE]
    grid = torch.zeros(1, 1, R, R, R)
    x, y, z = pipeline.voxels(asset).long().unbind(1)
    grid[0, 0, x, y, z] = 1
    with torch.no_grad():
        assert torch.equal(encoded, pipeline.part("sparse_structure_encoder")(grid)[0][0])


def test_latents_are_encoded_from_features_of_the_voxels(pipeline, monkeypatch):
    (asset,) = pipeline.decode(SparseBatch.join([latent(5, 60)]))
    monkeypatch.setattr(module, "ImageEncoder", lambda name, device: name)
    monkeypatch.setattr(
        module, "voxel_features", lambda asset, places, *_: places.float().sum(1, keepdim=True).expand(-1, 5)
    )
    encoded = pipeline.encode([asset])[0][LATENT]
    pipeline.stages[1].check("encoded", encoded)
    assert torch.equal(encoded.coords, pipeline.voxels(asset))
    features = encoded.coords.float().sum(1, keepdim=True).expand(-1, 5)
    with torch.no_grad():
        mean, _ = pipeline.part("slat_encoder")(SparseBatch.join([SparseSample(encoded.coords, features)]))
    assert torch.allclose(pipeline.unnormalised(encoded.feats), mean.feats, atol=1e-5)


def test_encoding_the_second_stage_names_the_missing_network(pipeline):
    (asset,) = pipeline.decode(SparseBatch.join([latent(4, 60)]))
    with raising("dinov2_vitl14_reg", kind=FileNotFoundError):
        pipeline.encode([asset])[0][LATENT]
    with pytest.raises(KeyError):
        pipeline.encode([asset])[0]["mesh"]


def test_latents_that_are_not_finite_are_rejected(pipeline):
    x_0 = torch.zeros(1, 2, 4, 4, 4)
    x_0[0, 1, 2, 3, 0] = float("nan")
    with raising("advance", "1 of 128"):
        pipeline.advance(STRUCTURE, x_0)
    batch = SparseBatch.join([latent(4)])
    with raising("decode", "80 of 80"):
        pipeline.decode(batch.with_feats(batch.feats / 0))


def test_embeddings_of_another_encoder_are_rejected(trellis_root):
    wide = Conditioning(tokens={"a": torch.zeros(3, E + 1)}, encoder="dinov2", zero_null=True)
    with raising("'structure'", "dinov2", "openai/clip"):
        FAMILY.load(trellis_root, wide)


def test_a_missing_model_file_is_reported_at_once(trellis_root, tmp_path):
    root = shutil.copytree(trellis_root, tmp_path / "root")
    (root / "ckpts" / "slat_dec_gs.safetensors").unlink()
    with raising("slat_decoder_gs", ".json", ".safetensors", "slat_dec_gs", kind=FileNotFoundError):
        FAMILY.files(root)  # of a problem with pairs of all stages
    assert FAMILY.files(root, ["structure"]) and FAMILY.load(root, tokens()).stages
    (root / "ckpts" / "slat_flow.json").unlink()
    with raising("slat_flow_model", ".json", kind=FileNotFoundError):
        FAMILY.load(root, tokens())


def test_without_the_flows_weights_it_still_encodes_and_decodes(trellis_root, pipeline):
    light = FAMILY.load(trellis_root, None, stages=())
    assert all(p.is_meta for stage in light.stages for p in stage.model.parameters())
    batch = SparseBatch.join([latent(4, 60)])
    assert torch.equal(light.decode(batch)[0].means, pipeline.decode(batch)[0].means)


# Freed tensors go back to the system.


SCRIPT = """
import torch
from eg3d_rlhf.tuning.flow.families.folder import return_freed_memory

def resident():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))

print(return_freed_memory())
before, kept = resident(), []
for _ in range(20):
    freed = [torch.ones(6 << 20) for _ in range(6)]  # 24 MiB each
    kept.append(torch.ones(1 << 18))  # 1 MiB
    del freed
print(resident() - before)
"""


@pytest.mark.long  # a fresh process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and needs glibc")
def test_small_tensors_do_not_keep_freed_large_tensors_in_memory(repo):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=repo, capture_output=True, text=True, check=True
    )
    worked, grown = done.stdout.split()
    assert worked == "True" and int(grown) < 60  # MiB; 148 without
