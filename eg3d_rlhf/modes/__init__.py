"""Registry of the trainings that `train.py --mode=NAME` offers, and the command that dispatches to them.

Each module of a mode defines the flags of the training, its settings, and the functions that open its files
and run it (`eg3d_rlhf.experiments.mode.Mode`).
"""

from typing import Any

import click

from eg3d_rlhf.core.cli import ReportsOnce, user_errors
from eg3d_rlhf.core.registry import Registry, load_plugins
from eg3d_rlhf.experiments.mode import Mode

# Two names may share a module: online.py adds both of its modes. Modules are imported on first use.
MODES: Registry[Mode] = Registry(
    "--mode",
    {
        "gan": "eg3d_rlhf.modes.gan",
        "circular-dpo": "eg3d_rlhf.modes.circular_dpo",
        "online": "eg3d_rlhf.modes.online",
        "grpo": "eg3d_rlhf.modes.online",
        "offline": "eg3d_rlhf.modes.offline",
        "distill": "eg3d_rlhf.modes.distill",
        "reward": "eg3d_rlhf.modes.reward_training",
        "mesh-reward": "eg3d_rlhf.modes.mesh_reward",
    },
)


class ModeCommand(ReportsOnce):
    """Command `train`, which passes its arguments to the command of the mode that --mode names.

    A flag that belongs to another mode is rejected with an error that names this mode.
    """

    def make_context(self, info_name, args, parent=None, **extra) -> click.Context:
        """Parse the arguments with the command of the mode that --mode names.

        The returned context belongs to the command of the mode. A user's error ends the program with exit
        code 2.
        """
        with user_errors():
            # Plugins first: they may add modes.
            load_plugins()
            mode_name, args = split_mode(list(args))
            command = MODES[mode_name].command
        try:
            return command.make_context(info_name, args, parent, **extra)
        except click.NoSuchOption as error:
            # Look for the flag in the other modes, so that the message can name where it belongs.
            # Flags may be typed with underscores, as in EG3D.
            flag_name = error.option_name.replace("_", "-")
            other_modes = [
                other_mode
                for other_mode in MODES
                if other_mode != mode_name and flag_name in option_names(MODES[other_mode].command)
            ]
            if not other_modes:
                raise
            with user_errors():
                remedy = f"Remove it, or see train.py --mode={other_modes[0]} --help."
                # `from None`: the user needs no traceback of click's own error
                raise ValueError(
                    f"{flag_name} is a flag of --mode={other_modes[0]}, not of --mode={mode_name}. {remedy}"
                ) from None

    def invoke(self, ctx: click.Context):
        """Run the command of the mode; its arguments were parsed by `make_context`."""
        # `ctx.command` is the mode's command, not this one: `make_context` returned its context.
        return ctx.command.invoke(ctx)


def split_mode(args: list[str]) -> tuple[str, list[str]]:
    """Separate the flag --mode from the other arguments of a command line.

    Args:
        args: arguments of `train.py`, in the order in which they were typed.

    Returns: the name of the mode, and the arguments without --mode. The name is 'gan' if --mode is absent;
        the last --mode counts if there are several.
    """
    mode_name = "gan"
    other_args = []
    arg_index = 0
    # Everything after "--" is positional by convention, so --mode is not looked for there.
    while arg_index < len(args) and args[arg_index] != "--":
        # two spellings: "--mode NAME" (two arguments) and "--mode=NAME" (one)
        if args[arg_index] == "--mode" and arg_index + 1 < len(args):
            arg_index, mode_name = arg_index + 1, args[arg_index + 1]
        elif args[arg_index].startswith("--mode="):
            mode_name = args[arg_index].removeprefix("--mode=")
        else:
            other_args.append(args[arg_index])
        arg_index += 1
    # --mode=circular_dpo is accepted as well as --mode=circular-dpo.
    return mode_name.replace("_", "-"), other_args + args[arg_index:]


def option_names(command: Any) -> set[str]:
    """Return all spellings of the options of a command, such as {"--seed", "--dry-run", "-n"}.

    Settings that only --help-all shows (`GroupedCommand.rare`) are included.
    """
    return {
        name
        for option in [*command.params, *command.rare.values()]
        # secondary_opts: the negative form of a switch, such as --no-mirror
        for name in option.opts + option.secondary_opts
    }
