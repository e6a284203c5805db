"""All steps of the controlled study in their order."""

import os
from pathlib import Path

import numpy as np
import safetensors.numpy

from eg3d_rlhf.evaluation.controlled_study.measurements import measure_arms
from eg3d_rlhf.evaluation.controlled_study.output import markdown, plot
from eg3d_rlhf.evaluation.controlled_study.plan import (
    Plan,
    check_steered,
    write_labels_of_arms,
    write_rewards,
)
from eg3d_rlhf.evaluation.controlled_study.results import compare
from eg3d_rlhf.evaluation.trainings import make_with_progress_bar
from eg3d_rlhf.experiments.table import write
from training.storage import write_atomic

ARRAYS = "controlled-study.safetensors"


def work(plan: Plan, process_count: int) -> list[Path]:
    """Run the missing steps, measure all arms, and write controlled-study.json, .md and .png.

    The errors of each latent are written as controlled-study.safetensors, from which every interval of the
    study can be computed again.

    Args: process_count: number of steps that run at the same time.
    Returns: the paths of the four files.
    """
    # The cores are divided among the processes that run at the same time.
    thread_count = max(1, (os.cpu_count() or 1) // process_count)
    for write_more, parts, bar_text in (
        (write_labels_of_arms, plan.label_parts(), "sets of labels"),
        (write_rewards, plan.reward_parts(), "rewards trained"),
        (check_steered, plan.steering_parts(), "networks steered"),
    ):
        make_with_progress_bar([[part] for part in parts], process_count, thread_count, bar_text)
        write_more(plan)
    # The runs of train.py need the rewards, so they are the last step.
    tuning_by_case = plan.tunings()
    make_with_progress_bar(
        [[part] for part in tuning_by_case.values()], process_count, thread_count, "networks tuned"
    )
    network_by_task = {
        part.name: network_path
        for part in tuning_by_case.values()
        if (network_path := part.network()) is not None
    }
    study_data, arrays = compare(
        plan,
        measure_arms(plan, network_by_task, process_count),
        {case: part.name for case, part in tuning_by_case.items()},
    )
    # Arrays come first: a reader of the JSON file then finds the arrays that belong to it.
    arrays_path = plan.out / ARRAYS
    write_atomic(
        arrays_path,
        safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in arrays.items()}),
    )
    return [*write(study_data, plan.out, "controlled-study", markdown, plot), arrays_path]
