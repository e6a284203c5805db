"""Registry of the trainings that `train.py --mode=NAME` offers, and the command that dispatches to them.

Each mode is one module with its flags, its settings and the objects that a run of it consists of.
"""

from typing import Any

import click

from eg3d_rlhf.core.cli import user_errors
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


class ModeCommand(click.Command):
    """Command that dispatches to the mode named by --mode and rejects flags of other modes by name."""

    def make_context(self, info_name, args, parent=None, **extra) -> click.Context:
        """Parse the arguments with the command of the mode that they name."""
        with user_errors():
            # Plugins first: they may add modes.
            load_plugins()
            mode, args = mode_of(list(args))
            command = MODES[mode].command
        try:
            return command.make_context(info_name, args, parent, **extra)
        except click.NoSuchOption as error:
            # Look for the flag in the other modes, so that the message can name where it belongs.
            name = error.option_name.replace("_", "-")
            others = [other for other in MODES if other != mode and name in flags_of(MODES[other].command)]
            if not others:
                raise
            with user_errors():
                remedy = f"Remove it, or see train.py --mode={others[0]} --help."
                raise ValueError(
                    f"{name} is a flag of --mode={others[0]}, not of --mode={mode}. {remedy}"
                ) from None

    def invoke(self, ctx: click.Context):
        """Run the mode's command, which parsed the arguments."""
        # `ctx.command` is the mode's command, not this one: `make_context` returned its context.
        return ctx.command.invoke(ctx)


def mode_of(args: list[str]) -> tuple[str, list[str]]:
    """Split off --mode: return the value of the last one, by default 'gan', and the other arguments."""
    mode = "gan"
    rest = []
    i = 0
    # Everything after "--" is positional by convention, so --mode is not looked for there.
    while i < len(args) and args[i] != "--":
        if args[i] == "--mode" and i + 1 < len(args):
            i, mode = i + 1, args[i + 1]
        elif args[i].startswith("--mode="):
            mode = args[i].removeprefix("--mode=")
        else:
            rest.append(args[i])
        i += 1
    # --mode=circular_dpo is accepted as well as --mode=circular-dpo.
    return mode.replace("_", "-"), rest + args[i:]


def flags_of(command: Any) -> set[str]:
    """Return all spellings of a command's settings; rare settings count as flags."""
    return {
        name
        for option in [*command.params, *command.rare.values()]
        for name in option.opts + option.secondary_opts
    }
