"""What modes of runs with arms share (offline.py, online.py): flags of the table, what they make of a run,
and the mode itself.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eg3d_rlhf.core.cli import option, options_of, together
from eg3d_rlhf.experiments.mode import RUN, Flags, Mode, refuse_torchrun
from eg3d_rlhf.modes.circular_dpo import COUNT, OWN, WHAT, WHOLE, check_tuning, kept, problems_own
from eg3d_rlhf.tuning.flow.base.evaluation import TABLE, Choosing, Judging
from eg3d_rlhf.tuning.flow.training.arm_runs import ArmsRun, Opened, work

stage_flag = option(
    "--stage", group=WHAT, metavar="NAME", default=None, show_default="the last", help="Which stage is tuned."
)
table_flags = together(
    problems_own(
        "--seeds", TABLE, "INT", COUNT, "Trainings of each arm, from --seed on.", "1; 3 with several arms"
    ),
    problems_own(
        "--choose-noises",
        TABLE,
        "INT",
        WHOLE,
        "Assets per condition behind a win rate in training, which chooses the network that is kept; 0: the"
        " last is.",
        rare=True,
    ),
    option("--no-summary", group=RUN, rare=True, is_flag=True, help="Skip the table that ends a run."),
    options_of(Judging, everywhere=OWN),
)


def check_arms(flags: Flags, several: bool) -> None:
    """Refuse what would have no effect. Args: several: arms. Raises: ValueError naming it."""
    flags.belong(("jobs",), several or (flags["seeds"] or 1) > 1, "several trainings (--arms, --seeds)")
    flags.belong(
        ("table_noises", "judge_batch"), not flags["no_summary"], "the table, which --no-summary leaves out"
    )
    check_tuning(flags)


def fields_of(flags: Flags, defaults: ArmsRun, arms: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a run that do not depend on what arms learn from."""
    choosing = defaults.choosing
    seed = flags["seed"]
    count = flags["seeds"] or (3 if len(arms) > 1 else 1)
    if flags["choose_noises"] is not None:
        choosing = (
            replace(choosing or Choosing(), per_condition=flags["choose_noises"])
            if flags["choose_noises"]
            else None
        )
    return {
        "stage": flags["stage"],
        "arms": arms,
        "training_seeds": tuple(range(seed, seed + count)),
        "choosing": choosing,
        "judging": replace(defaults.judging, **flags.of(Judging)),
        "summary": not flags["no_summary"],
    }


def names_of(flags: Flags) -> tuple[str, ...]:
    """Arms that are named."""
    return tuple(name.strip() for name in flags["arms"].split(","))


def record(mode: str, settings: ArmsRun, opened: Opened) -> dict:
    """Of a run folder: its settings and what they opened."""
    problem, labelled = opened
    labels = {} if labelled is None else {"labels": labelled.identity}
    return {"mode": mode, "run": asdict(settings), "problem": dict(problem.identity), **labels}


def mode_of_arms(
    name: str,
    settings: type[ArmsRun],
    title: Callable[[Any], str],
    open: Callable[[Any, Any], Opened],
    **more: Any,
) -> Mode:
    """The mode.

    Args: title: of settings, what its folders are called between the mode's name and the generator's; open,
        more: see Mode.
    """

    def opened(settings: ArmsRun, run: Any) -> Opened:
        refuse_torchrun(len(settings.arms) * len(settings.training_seeds) > 1, "--arms, --seeds")
        return open(settings, run)

    def titled(settings: ArmsRun, opened: Opened) -> str:
        generator = Path(settings.source.pipeline).name
        return f"{settings.NAME}-{title(settings)}-{generator}-{settings.stage_in(opened[0]).name}"

    return Mode(
        name=name,
        settings=settings,
        open=opened,
        work=work,
        title=titled,
        record=lambda settings, opened: record(name, settings, opened),
        recorded=kept(settings, name)["recorded"],
        jobs="several trainings",
        **more,
    )
