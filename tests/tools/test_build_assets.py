"""What the shape critic learns from: early snapshots of the generator's run."""

import pytest

from tests.evaluation.comparisons import write_run
from tools.build_assets import early_snapshots


def test_early_snapshots_end_at_half_of_the_run(tmp_path):
    run = write_run(tmp_path / "00000-generator", {1000 * i: 0.0 for i in (1, 2, 4, 8, 16)}, 0.0)
    assert [int(path.stem[-6:]) for path in early_snapshots(run)] == [1, 2, 3]  # after 2, 4 and 8 thousand images
    late = write_run(tmp_path / "00001-generator", {9000: 0.0, 16000: 0.0}, 0.0)
    with pytest.raises(ValueError, match="expected snapshots from the first half of 00001-generator, got none"):
        early_snapshots(late)
