"""What train.py can train, by the name that --mode has: one file each, with its flags, its settings and what
they compose.
"""

from typing import Any

import click

from eg3d_rlhf.core.cli import user_errors
from eg3d_rlhf.core.registry import Registry, load_plugins
from eg3d_rlhf.experiments.mode import Mode

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
    """Hands over to the command of the mode that --mode names; a flag of another mode is refused by name."""

    def make_context(self, info_name, args, parent=None, **extra) -> click.Context:
        """Parse for the mode that the arguments name."""
        with user_errors():
            load_plugins()
            mode, args = mode_of(list(args))
            command = MODES[mode].command
        try:
            return command.make_context(info_name, args, parent, **extra)
        except click.NoSuchOption as error:
            name = error.option_name.replace("_", "-")
            others = [other for other in MODES if other != mode and name in flags_of(MODES[other].command)]
            if not others:
                raise
            with user_errors():
                remedy = f"Leave it out, or see train.py --mode={others[0]} --help."
                raise ValueError(f"{name}: belongs to --mode={others[0]}. {remedy}") from None

    def invoke(self, ctx: click.Context):
        return ctx.command.invoke(ctx)


def mode_of(args: list[str]) -> tuple[str, list[str]]:
    """Value of the last --mode, 'gan' where there is none, and the other arguments."""
    mode = "gan"
    rest = []
    i = 0
    while i < len(args) and args[i] != "--":
        if args[i] == "--mode" and i + 1 < len(args):
            i, mode = i + 1, args[i + 1]
        elif args[i].startswith("--mode="):
            mode = args[i].removeprefix("--mode=")
        else:
            rest.append(args[i])
        i += 1
    return mode.replace("_", "-"), rest + args[i:]


def flags_of(command: Any) -> set[str]:
    """All spellings of a command's settings, rare ones as if they were flags."""
    return {
        name
        for option in [*command.params, *command.rare.values()]
        for name in option.opts + option.secondary_opts
    }
