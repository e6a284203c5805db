"""Keeps a process that computes large models on a CPU near the memory that its tensors need."""

import ctypes

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
THRESHOLD = 1 << 20  # bytes


def return_freed_memory() -> bool:
    """Have glibc return every freed tensor of 1 MiB or more to the system, from now on in this process. False where there is no glibc.

    By itself glibc comes to keep freed blocks of up to 32 MiB for later, in a heap that the few tensors kept between a network's blocks
    then break into pieces too small to use: a pass over TRELLIS's flows grew by 15 times what it keeps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD))
