"""From ranked assets to a tuned TRELLIS in its published layout, by the command line alone."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import train
from eg3d_rlhf.tuning.flow.base.settings import ProblemSource
from eg3d_rlhf.tuning.flow.families.opening import open_problem
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from eg3d_rlhf.tuning.flow.families.trellis_files import LATENT, STRUCTURE, read_pipeline
from tests.modes.flow_works import flow
from tests.tuning.flow.families.trellis.test_trellis_problem import write_people
from tests.tuning.flow.families.trellis.tiny_trellis import tokens

FAST = "--set=warmup=0 --batch=4 --set=choose_noises=0 --set=no_summary=true --device=cpu".split()


def circular_dpo(*flags):
    done = CliRunner().invoke(train.main, ["--mode=circular-dpo", *FAST, *map(str, flags)])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def run(trellis_root, tmp_path_factory):
    """Run a loop of a few steps, and return its folder."""
    folder = tmp_path_factory.mktemp("loop")
    pairs = write_people(folder / "pairs", read_pipeline(trellis_root))
    # the last stage must move far enough, in a few steps, that decoding fills other voxels
    circular_dpo(
        f"--pipeline={trellis_root}",
        f"--pairs={pairs}",
        f"--outdir={folder / 'runs'}",
        "--lr=0.02",
        "--steps=12",
        "--set=roles=reward",
    )
    (folder_of_run,) = (folder / "runs").glob("00000-*")
    return folder_of_run


def test_the_loop_tunes_both_stages(run):
    for stage in (STRUCTURE, LATENT):
        adapter = load_file(run / stage / "adapter_model.safetensors")
        assert any(float(t.abs().max()) > 0 for name, t in adapter.items() if "lora_B" in name)


def test_the_result_is_exported_to_the_published_layout(run, trellis_root, tmp_path):
    printed = flow("export", run, f"--outdir={tmp_path / 'out'}")
    assert STRUCTURE in printed and LATENT in printed
    tuned, base = (FAMILY.load(root, tokens()) for root in (tmp_path / "out", trellis_root))
    for stage, old in zip(tuned.stages, base.stages, strict=True):
        moved = [
            not torch.equal(a, b)
            for a, b in zip(stage.model.parameters(), old.model.parameters(), strict=True)
        ]
        assert any(moved)


def test_the_encoding_reaches_the_pipeline(trellis_root, tmp_path):
    pairs = write_people(tmp_path / "pairs", read_pipeline(trellis_root))
    source = ProblemSource(pipeline=str(trellis_root), pairs=str(pairs), voxel_share=0.5, views=3)
    pipeline = open_problem(source).pipeline
    assert (pipeline.encoding.share, pipeline.encoding.views) == (0.5, 3)
