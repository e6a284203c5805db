"""What docs/circular-dpo.md says of GRPO on the toy, for one training seed."""

from dataclasses import replace

import pytest
import torch

from eg3d_rlhf.tuning.flow.grpo import report
from eg3d_rlhf.tuning.flow.grpo.run import BASE, Worker
from eg3d_rlhf.tuning.flow.grpo.settings import TOY_RUN
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem

ARMS = ("grpo", "shuffled", "inverted")


@pytest.mark.long
def test_the_reward_rises_on_held_out_conditions_and_the_controls_do_not_raise_it(tmp_path):
    torch.set_num_threads(1)
    settings = replace(TOY_RUN, arms=ARMS, training_seeds=(3,))
    worker = Worker(settings, tmp_path, toy_problem(), say=lambda line: None)
    results = {task: worker(task) for task in (BASE, *(f"{arm}-3" for arm in ARMS))}
    arms = report.table(results, ARMS, (3,), {"stage": "voxels"})["arms"]
    assert arms["grpo"]["reward"]["up"] >= 0.9 and arms["grpo"]["judges"]["final"]["ci95"][0] > 0.5
    assert 0 < arms["grpo"]["kl"][0] < 0.02
    assert arms["shuffled"]["reward"]["up"] < 0.7 and arms["inverted"]["reward"]["up"] < 0.2
