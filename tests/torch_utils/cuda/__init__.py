"""Tests of the CUDA halves of the ops: by emulation, by compiling them,
and on a device where there is one.
"""
