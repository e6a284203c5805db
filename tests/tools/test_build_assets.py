"""What `make assets` names must be what its stages write."""

from eg3d_rlhf.modes.assets import EARLY, STAGES
from eg3d_rlhf.modes.gan import GAN, resolve


def test_the_critics_snapshots_are_written_in_the_first_half_of_their_stage():
    for stage, tags in EARLY.items():
        flags = [flag for flag in STAGES[stage] if not flag.startswith("--set=start")]
        loop = resolve(GAN.command.make_context("train", flags).params).loop
        step = -(-round(loop.tick * 1000) // loop.batch) * loop.batch * loop.snap  # images between snapshots
        written = {loop.tag(n) for n in range(step, round(loop.kimg * 500) + 1, step)}
        assert set(tags) <= written, stage
