"""Reader of EG3D's pickles that runs no code in them: `load` returns networks, `read` records and the names
that a file refers to.

Loading such a file with `pickle` executes the source text that it contains. Here it is parsed as a stream of
opcodes by a small interpreter (pickle_reader.py), which knows only the names that EG3D's snapshots use. Each
name stands for an inert record. The torch streams inside are parsed in the same way (snapshot.py), and
networks are built from the constructor arguments in the file (rebuild.py).
"""

from eg3d_rlhf.generators.pickles.rebuild import load, plan, rebuild
from eg3d_rlhf.generators.pickles.snapshot import Snapshot, parse, read, tensors

__all__ = ["Snapshot", "load", "parse", "plan", "read", "rebuild", "tensors"]
