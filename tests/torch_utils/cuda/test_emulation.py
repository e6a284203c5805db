"""The emulated device notices what it promises to notice."""

import numpy as np
import pytest

from tests.torch_utils.cuda.emulation import HERE, needs_compiler, run

pytestmark = needs_compiler


def reversed_by(folder, mistake, order=0):
    return run(HERE / "mistakes.cpp", folder, [mistake], order)


@pytest.mark.parametrize("order", [0, 1])
def test_a_right_kernel(tmp_path, order):
    assert reversed_by(tmp_path, 0, order).returncode == 0
    assert np.array_equal(np.fromfile(tmp_path / "out", np.float32), np.arange(60.0)[::-1])


@pytest.mark.parametrize("mistake", [1, 5], ids=["barrier", "shuffle"])
def test_threads_that_never_come(tmp_path, mistake):
    done = reversed_by(tmp_path, mistake)
    assert done.returncode == 3 and "barrier" in done.stderr


@pytest.mark.parametrize("mistake", [3, 4], ids=["global memory", "shared memory"])
def test_access_outside_a_buffer(tmp_path, mistake):
    done = reversed_by(tmp_path, mistake)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_a_missing_barrier(tmp_path):
    """Memory that has not been written yet reads as NaN."""
    assert reversed_by(tmp_path, 2).returncode == 0
    assert np.isnan(np.fromfile(tmp_path / "out", np.float32)).any()
