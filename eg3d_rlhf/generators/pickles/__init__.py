"""EG3D's own pickles, read without running them: `load` gives networks, `read` the records and the names that
a file asks for.

Loaded the usual way such a file executes the source text that it carries. Here it is a stream of opcodes for
a small machine (machine.py) that knows the names of eg3d.md, section 9, each standing for an inert record,
and parses the torch streams inside (snapshot.py); networks are rebuilt from the stated constructor arguments
(rebuild.py).
"""

from eg3d_rlhf.generators.pickles.rebuild import load, plan, rebuild
from eg3d_rlhf.generators.pickles.snapshot import Snapshot, parse, read, tensors

__all__ = ["Snapshot", "load", "parse", "plan", "read", "rebuild", "tensors"]
