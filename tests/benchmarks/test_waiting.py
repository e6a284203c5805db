"""`python -m benchmarks.waiting`: every case runs; workers leave nothing to wait for, and nothing behind."""

import multiprocessing
import re
import time

import pytest
from click.testing import CliRunner

from benchmarks import waiting
from training.dataset import ImageFolderDataset


def test_every_case_is_shown():
    flags = ["--seconds=0.02", "--iterations=2", "--batch=4", "--resolution=16", "--images=8", "--workers=2"]
    result = CliRunner().invoke(waiting.main, flags)
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert head.startswith("4 images of 16 pixels") and "an iteration of 0.02 s" in head
    assert [line.split("  waits")[0].split() for line in lines] == [
        [name, count, "workers"] for name in ("elsewhere", "here") for count in ("0", "2")
    ]
    assert all(
        re.search(
            r"waits +\d+\.\d\d ms of +\d\.\d{3} s: +\d+\.\d{3}%; floats \d+ ms; first batch after", line
        )
        for line in lines
    )
    assert multiprocessing.active_children() == []


@pytest.mark.long
def test_training_waits_less_than_two_percent_of_an_iteration(tmp_path):
    waiting.write_images(tmp_path / "images.zip", 512, 64)
    dataset = ImageFolderDataset(tmp_path / "images.zip", use_labels=False).without_memory()
    alone, ahead = (waiting.measure(dataset, 32, workers, 4, lambda: time.sleep(2)) for workers in (0, 1))
    assert ahead.waited < 0.02 * ahead.iteration and alone.waited > 10 * ahead.waited
