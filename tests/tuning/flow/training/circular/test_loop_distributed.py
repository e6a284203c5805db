"""Test the whole loop on two ranks: it gives the same artefacts as one rank, up to rounding, and the ranks
share the work of making pairs.
"""

import pytest
import torch

from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.models.policies import tuned_model
from eg3d_rlhf.tuning.flow.base.pairs import read_pairs
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import CircularLoop, run_loop
from tests.training.test_distributed import finish, start
from tests.tuning.flow.tiny_problem import SETTINGS, tiny_problem

CODE = """
import sys
from pathlib import Path
import torch
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import LoopPairMaker
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.tuning.flow.training.circular.circular_loop import CircularLoop, run_loop
from tests.tuning.flow.tiny_problem import SETTINGS, tiny_problem
from training.distributed import process_group
torch.set_num_threads(1)
made, original = [], LoopPairMaker.__call__
def counted(self, pairs, on_pair=None):
    made.append(len(pairs))
    return original(self, pairs, on_pair)
LoopPairMaker.__call__ = counted
with process_group(torch.device("cpu"), 2.0) as ranks:
    store = Store(Path(sys.argv[1]), ranks)
    silent = lambda line: None
    loop = CircularLoop(problem=tiny_problem(), settings=SETTINGS, store=store, ranks=ranks, say=silent)
    for again in range(2):
        run_loop(loop)
print(made)
"""


@pytest.mark.long
def test_two_ranks_make_what_one_makes(tmp_path):
    printed = finish(start(CODE, str(tmp_path / "two")))
    assert [out for out, _ in printed] == ["[5, 2]\n", "[5]\n"]  # chunks of 5, 5 and 2 human pairs, once
    loop = CircularLoop(
        problem=tiny_problem(), settings=SETTINGS, store=Store(tmp_path / "one"), say=lambda line: None
    )
    lines, _ = run_loop(loop)
    for stage, model in loop.models(lines).items():
        name = lines[stage][0].folder.name.rsplit("-", 1)[0]
        (folder,) = (tmp_path / "two").glob(f"{name}-*")
        base = loop.problem.pipeline.stages[stage == "voxels"].model
        other = tuned_model(base, folder / "training" / "policy", merge=True).state_dict()
        assert all(
            torch.allclose(value, other[key], rtol=1e-3, atol=1e-5)
            for key, value in model.state_dict().items()
        ), stage
    (pairs_of_two,) = (tmp_path / "two").glob("pairs-*/pairs")
    (pairs_of_one,) = (tmp_path / "one").glob("pairs-*/pairs")
    ids = [[pair.id for pair in read_pairs(folder)[0]] for folder in (pairs_of_one, pairs_of_two)]
    assert ids[0] == ids[1]
