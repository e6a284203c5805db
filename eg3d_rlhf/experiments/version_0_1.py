"""Conversion of what version 0.1 (commit 52ebe99) wrote, where the present code writes it differently.

No other module contains code for an earlier version. Run folders, rewards, label stores and their exports,
studies, folders WORK, artefact stores and networks of version 0.1 have the present form except for what the
functions below convert; `tests/compat/test_version_0_1.py` opens one of each. A change of a form that is
written to disk adds its conversion here. Folders of versions before 0.1 are not supported.
"""

from collections.abc import MutableMapping

import torch


def drop_comparison_counter(state: MutableMapping[str, torch.Tensor], prefix: str) -> None:
    """Remove the tensor `offset` that checkpoints of runs with --reward-shaping=reference hold.

    It counted comparisons with reference samples, and nothing read it.
    """
    state.pop(f"{prefix}offset", None)
