"""The flag --weak-reward of all jobs that tune by a reward; see eg3d_rlhf/rewards/stated_accuracy.py."""

from eg3d_rlhf.core.cli import Decorator, option


def weak_reward_option(group: str) -> Decorator:
    """Return a decorator that adds --weak-reward to a command.

    Args: group: title under which --help lists the flag.
    """
    return option(
        "--weak-reward",
        group=group,
        is_flag=True,
        help=(
            "Accept a reward whose accuracy on held-out labels is not above chance, that is, whose 95 %"
            " interval includes one half. Without this flag such a reward is rejected."
        ),
    )
