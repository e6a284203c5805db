"""The full-size generator (ffhq512-128 architecture, random weights) as a 512^3 mesh,
on a CPU, within 4 GB.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import trimesh

from training import networks
from training.config import GanConfig, NetworkConfig, networks_for
from training.triplane import TriPlaneGenerator

PEAK_BYTES = 4e9
# random weights give raw densities of about 0 to 2, so the surface is taken at 1 where a trained generator
# has 10
LEVEL = "1"


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Network file of an untrained generator as published for FFHQ at 512 pixels."""
    G_kwargs, _ = networks_for(NetworkConfig(cfg="ffhq", d_num_fp16_res=0), 512, GanConfig(nrr_initial=128))
    torch.manual_seed(0)
    G = TriPlaneGenerator(**G_kwargs).eval().requires_grad_(False)
    assert sum(p.numel() for p in G.parameters()) == 30_662_136
    path = tmp_path_factory.mktemp("networks") / "full.safetensors"
    networks.save(
        path,
        networks.Networks(None, None, G, G_kwargs, None, {"name": "random", "resolution": 512}),
        only_ema=True,
    )
    return path


@pytest.mark.long
def test_a_512_cubed_mesh_of_the_full_size_generator(full_size, repo, tmp_path):
    out = tmp_path / "full.ply"
    command = [
        sys.executable,
        "-m",
        "eg3d_rlhf",
        "samples",
        "mesh",
        f"--network={full_size}",
        "--resolution=512",
        f"--set=level={LEVEL}",
        f"--out={out}",
    ]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        child = subprocess.Popen([*command, "--device=cpu"], cwd=repo, stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)  # this child's own peak
    text = log.read_text()
    peak = usage.ru_maxrss * 1024
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert 1e8 < peak < PEAK_BYTES
    report = json.loads(out.with_name("full.ply.json").read_text())
    assert report["watertight"] and report["outward"] and report["open_edges"] == report["shared_edges"] == 0
    assert report["normals_down_density"] > 0.999
    assert report["faces"] > 1e6
    percentages = [
        int(part.split("%")[0].split()[-1])
        for part in text.replace("\r", "\n").split("\n")
        if "density:" in part
    ]
    assert percentages[-1] == 100 and len(set(percentages)) >= 10
    mesh = trimesh.load(out, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(report["volume"], rel=1e-3)
    assert np.ptp(mesh.visual.vertex_colors[:, :3], axis=0).min() > 0
