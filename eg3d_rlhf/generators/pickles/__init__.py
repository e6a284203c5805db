"""Reader of EG3D's network pickles, which runs no code from the file.

`load` returns networks. `read` returns the contents of a file as records, and the Python names that the file
refers to.

Loading such a file with `pickle` executes source text that the file contains. Here the file is parsed
as a stream of opcodes by a small interpreter (pickle_reader.py), which accepts only the names that
EG3D's snapshots use. Each name becomes a record that cannot execute anything. The torch streams inside
the file are parsed in the same way (snapshot.py), and networks are built from the constructor arguments
in the file (rebuild.py).

`write` writes such a pickle with the classes of the user's own checkout of EG3D, in a child process
(checkout.py).
"""

from eg3d_rlhf.generators.pickles.checkout import SUFFIX, check_networks, find_code, write
from eg3d_rlhf.generators.pickles.rebuild import load, neural_rendering_resolution, plan, rebuild
from eg3d_rlhf.generators.pickles.snapshot import Snapshot, parse, read, tensors

__all__ = [
    "SUFFIX",
    "Snapshot",
    "check_networks",
    "find_code",
    "load",
    "neural_rendering_resolution",
    "parse",
    "plan",
    "read",
    "rebuild",
    "tensors",
    "write",
]
