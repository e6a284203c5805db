"""A training run small enough for a test: 24 noise images of 32 pixels, planes of 16 pixels with 8 channels,
8 rendered pixels.
"""

import copy
import io
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from click.testing import CliRunner

import train
from eg3d_rlhf.core import registry
from eg3d_rlhf.experiments.run import Run
from eg3d_rlhf.generators import FAMILIES
from training import networks
from training.config import GanConfig, LoopConfig, NetworkConfig, networks_for
from training.dataset import ImageFolderDataset
from training.distributed import SINGLE
from training.gan import Gan
from training.gan_phases import Batch, GanPhases
from training.loop import TrainingLoop
from training.rendering.cameras import FFHQ_FOCAL, LookAtPoseSampler, intrinsics_matrix, pack_label

RESOLUTION = 32
COUNT = 24
RENDERED = 8
NET = {
    "cbase": 256,
    "cmax": 8,
    "sr_num_fp16_res": 0,
    "d_num_fp16_res": 0,
    "plane_layout": "fixed",
    "sr_module": "SuperresolutionHybrid2X",
}
GAN = {
    "gamma": 1.0,
    "blur_fade_kimg": 0.03,
    "blur_init_sigma": 2.0,
    "gpc_reg_fade_kimg": 0.05,
    "nrr_initial": RENDERED,
    "glr": 0.002,
    "ema_kimg": 0.02,
    "d_reg_interval": 2,
    "density_reg_every": 2,
    "grid": (2, 1),
}
LOOP = {"batch": 4, "kimg": 0.032, "tick": 0.016}


def write_dataset(path: Path, resolution: int = RESOLUTION, mode: str = "RGB") -> Path:
    """A zip in EG3D's format: smooth noise with cameras about frontal."""
    random = np.random.RandomState(7)
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(COUNT):
            coarse = random.randint(0, 256, (4, 4, 3), dtype=np.uint8)
            image = (
                PIL.Image.fromarray(coarse)
                .resize((resolution, resolution), PIL.Image.Resampling.BICUBIC)
                .convert(mode)
            )
            buffer = io.BytesIO()
            image.save(buffer, format="png")
            name = f"00000/img{i:08d}.png"
            archive.writestr(name, buffer.getvalue())
            yaw, pitch = random.randn(2) * 0.2 + math.pi / 2
            pose = LookAtPoseSampler.sample(yaw, pitch, torch.zeros(3), radius=2.7)
            rows.append([name, pack_label(pose, intrinsics_matrix(FFHQ_FOCAL))[0].tolist()])
        archive.writestr("dataset.json", json.dumps({"labels": rows}))
    return path


def build_networks(
    gan: GanConfig | None = None, seed: int = 0, z_dim: int = 8, **override
) -> networks.Networks:
    """Fresh tiny networks."""
    G, D = networks_for(NetworkConfig(**{**NET, **override}), RESOLUTION, gan or GanConfig(**GAN))
    G["rendering_kwargs"].update(depth_resolution=4, depth_resolution_importance=4)
    G["sr_kwargs"]["block_channels"] = [8, 8]
    del G["use_noise"], G["mapping_kwargs"]["lr_multiplier"]  # as EG3D has them
    G.update(
        z_dim=z_dim,
        w_dim=16,
        plane_resolution=16,
        plane_channels=8,
        decoder_hidden_dim=8,
        neural_rendering_resolution=RENDERED,
    )
    torch.manual_seed(seed)
    return networks.build(G, D, {"name": "tiny", "resolution": RESOLUTION})


def build_loop(
    data: Path,
    run_dir: Path,
    *,
    gan: dict | None = None,
    loop: dict | None = None,
    phases=(),
    augment_pipe=None,
    nets=None,
    ranks=SINGLE,
) -> TrainingLoop:
    """A loop over the four GAN phases and `phases` (a function of the networks that returns more of them)."""
    gan_config = GanConfig(**{**GAN, **(gan or {})})
    config = LoopConfig(**{**LOOP, **(loop or {})})
    nets = nets or build_networks(gan_config)
    all_phases = GanPhases(nets.G, nets.D, gan_config, augment_pipe).phases()
    all_phases += phases(nets) if callable(phases) else list(phases)
    subject = Gan(
        nets, ImageFolderDataset(data, c_dim=25), gan_config, config, augment_pipe=augment_pipe, ranks=ranks
    )
    return TrainingLoop(subject, all_phases, config, Run(run_dir, {}, ranks=ranks), ranks=ranks)


def batch(data: Path, n: int = 4, cur_nimg: int = 0, seed: int = 0) -> Batch:
    """Real images and labels, latents and cameras for one phase."""
    dataset = ImageFolderDataset(data, c_dim=25)
    images = torch.from_numpy(np.stack([dataset[i][0] for i in range(n)])).float() / 127.5 - 1
    labels = torch.from_numpy(np.stack([dataset.get_label(i) for i in range(n)]))
    z = torch.randn([n, 8], generator=torch.Generator().manual_seed(seed))
    return Batch(images, labels, z, labels.flip(0), cur_nimg)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's state."""
    return copy.deepcopy(module.state_dict())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Equal names and bit-equal values."""
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def train_flags(data: Path, init: Path, outdir: Path, *more: str) -> list[str]:
    """Flags of train.py for the tiny networks saved at `init`."""
    return [
        f"--data={data}",
        f"--init={init}",
        f"--outdir={outdir}",
        "--batch=4",
        f"--nrr-initial={RENDERED}",
        "--device=cpu",
        "--glr=0.002",
        "--dlr=0.002",
        "--set=ema_kimg=0.02",
        "--density-reg-every=2",
        "--gen-pose-cond=True",
        *more,
    ]


def forget_plugin(name: str) -> None:
    """Undo the import of a plugin that brought the generator family `name` in a file of that name."""
    del FAMILIES._entries[name], sys.modules[name]
    registry._loaded.clear()


def run(*flags):
    """train.py with these flags, in this process."""
    return CliRunner().invoke(train.main, [str(f) for f in flags])


def only_run(outdir: Path) -> Path:
    """The one run folder in outdir."""
    (folder,) = outdir.iterdir()
    return folder


def whole_run(data: Path, init: Path, outdir: Path, *more: str) -> Path:
    """A run from start to end; returns its folder."""
    result = run(*train_flags(data, init, outdir, *more))
    assert result.exit_code == 0, result.output
    return only_run(outdir)
