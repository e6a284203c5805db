"""All steps of the controlled study in their order."""

import os
from pathlib import Path

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


def work(plan: Plan, process_count: int) -> list[Path]:
    """Run the missing steps, measure all arms, and write controlled-study.json, .md and .png.

    Args: process_count: number of steps that run at the same time.
    Returns: the paths of the three files.
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
    study_data = compare(
        plan,
        measure_arms(plan, network_by_task, process_count),
        {case: part.name for case, part in tuning_by_case.items()},
    )
    return write(study_data, plan.out, "controlled-study", markdown, plot)
