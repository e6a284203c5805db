"""Memory and operations of the published generators, which a file of this package states.

Tracing them takes minutes, and their sizes do not change. `python -m builders.flow_memory` writes the file
published_memory.json beside this module. A test traces one stage again.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eg3d_rlhf.tuning.flow.workspace.estimate import StageCost

FILE = Path(__file__).with_name("published_memory.json")
PRECISION = "bfloat16"  # data type of the passes for which the file states the costs
DEVICE = "cuda"  # type of the device for which the file states the costs


@functools.cache
def published_costs() -> Mapping[str, Sequence[StageCost]]:
    """Return the costs of the published generators: name of a generator -> costs of its stages."""
    costs_by_generator = json.loads(FILE.read_text())
    return {
        name: [StageCost(precision=PRECISION, **entries) for entries in costs]
        for name, costs in costs_by_generator.items()
    }
