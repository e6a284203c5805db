"""`train.py --mode=circular-dpo`: preference training of a generator in stages, as a loop, of one stage, or as an ablation."""

import json
import os
import sys

import click

from eg3d_rlhf.cli import GroupedCommand, choose_device
from eg3d_rlhf.flow.circular import flags
from eg3d_rlhf.flow.circular.flag_settings import check, resolve
from eg3d_rlhf.flow.circular.problems import default_settings
from eg3d_rlhf.flow.circular.run import planned, read_run
from eg3d_rlhf.flow.circular.running import resume, start
from eg3d_rlhf.flow.tuning.train import StoppedError
from training.distributed import process_group
from training.signals import sigterm_interrupts

STOPPED = 130  # exit status


@click.command("train.py --mode=circular-dpo", cls=GroupedCommand, context_settings={
    "help_option_names": ["-h", "--help"], "max_content_width": 140,
})
@flags.run_flags
@flags.what_flags
@flags.loss_flags
@flags.train_flags
@flags.loop_flags
@flags.table_flags
@click.pass_context
def circular_dpo(context: click.Context, **given) -> None:
    """Preference training of a generator in stages (Circular-DPO), by default of the bundled toy: the last stage learns from people's
    pairs, and every stage before it from what the one behind it then makes better. A run that was stopped goes on with --resume=RUN,
    or with the same flags.

    \b
    Examples:
        python train.py --mode=circular-dpo
        python train.py --mode=circular-dpo --ablate=a..i
        python train.py --mode=circular-dpo --stage=structure --beta=100
    """
    written = {name for name in given if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE}
    check(given, written)
    run = None if given["resume"] is not None else resolve(given, default_settings(given["pipeline"]))
    if given["dry_run"]:
        click.echo(json.dumps(planned(run or read_run(given["resume"])[0]), indent=2, sort_keys=True))
        return
    if given["ablate"] is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--ablate: expected one process, got torchrun's several. Use --workers.")
    try:
        with sigterm_interrupts(), process_group(choose_device(given["device"]), given["timeout"]) as ranks:
            device = str(ranks.device) if ranks.world > 1 else str(choose_device(given["device"]))
            if run is None:
                resume(given["resume"], device, given["workers"], ranks)
            else:
                start(run, given["outdir"], given["desc"], device, given["workers"], ranks)
    except (StoppedError, KeyboardInterrupt) as stopped:
        why = f": {stopped}" if str(stopped) else "."
        click.echo(f"Stopped{why} The same command, or --resume=RUN, goes on from there.", err=True)
        sys.exit(STOPPED)
