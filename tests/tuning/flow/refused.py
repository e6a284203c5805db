"""Check that train.py rejects a family's folder: one line, exit code 2, no run."""

from click.testing import CliRunner

import train
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, write_pairs
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION
from tests.rejections import check_message


def write_people(folder, stage, preferred, rejected, conditioning: Conditioning):
    """Two pairs of a stage, with embeddings; returns the folder."""
    names = conditioning.names[:2]
    pairs = [
        PreferencePair(id=n, condition=n, stage=stage, preferred=preferred, rejected=rejected) for n in names
    ]
    write_pairs(folder / stage, pairs, {"convention": CONVENTION})
    write_conditioning(folder / "conditioning.safetensors", conditioning)
    return folder


def train_rejected(root, pairs, stage, tmp_path, *names: str) -> str:
    """Assert that train.py rejects the folders with one line that names all of `names`, and starts no run;
    return the line.
    """
    flags = [
        f"--pipeline={root}",
        f"--pairs={pairs}",
        f"--outdir={tmp_path / 'runs'}",
        f"--stage={stage}",
        "--steps=1",
        "--device=cpu",
    ]
    result = CliRunner().invoke(train.main, ["--mode=circular-dpo", *flags])
    assert result.exit_code == 2 and not (tmp_path / "runs").exists()
    # the notice of the generator's licence may come before it, once in a process
    return check_message(result.stderr.splitlines()[-1], names)
