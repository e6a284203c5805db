"""The commands of docs/reference/families.md for a TRELLIS folder, run as they stand, on the tiny one."""

import pytest
import torch

from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.families.trellis import FAMILY
from tests.tuning.flow.documented_commands import run_section
from tests.tuning.flow.families.trellis.tiny_trellis import NAMES, tokens

FEW = "--steps=12 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --table-noises=2".split()
FEW += ["--set=loop_pairs=2", "--set=roles=reward", "--device=cpu"]


class Clip:
    """In place of weights that are not on this machine."""

    def __init__(self, name, device):
        pass

    def conditions(self, texts):
        assert tuple(texts) == NAMES
        return tokens()


@pytest.mark.long
def test_from_texts_to_a_folder_that_stock_trellis_loads(trellis_root, tmp_path, monkeypatch):
    monkeypatch.setattr("eg3d_rlhf.tuning.flow.families.trellis.TextEncoder", Clip)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("\n".join(NAMES))
    called = run_section("TRELLIS", trellis_root, tmp_path, FEW, each=4)
    assert called == ["new", "sample", "pairs", "train", "export"]
    base, tuned = (FAMILY.load(root, tokens()) for root in (trellis_root, tmp_path / "TUNED"))
    both = zip(base.stages, tuned.stages, strict=True)  # a stage that no update made better stays as it was
    weights = [zip(one.model.parameters(), other.model.parameters(), strict=True) for one, other in both]
    assert any(not torch.equal(a, b) for of_stage in weights for a, b in of_stage)
    assert generate(tuned, [NAMES[0]], [0])[0].means.isfinite().all()
