"""How the kernels read weights: several rows at once, far from one another.

Each is a stream that the processor's prefetchers follow for itself. One stream, or rows side by side, reads memory at
two thirds of the speed.
"""

# mypy: allow-untyped-defs
# (numba infers the types of compiled functions)

from __future__ import annotations

from numba import njit

from mambacus.ops.simd import prefetch

STREAMS = 6  # rows of weights that are read at once
AHEAD = 512  # bytes from the weights being read to those asked for


@njit
def share(outputs, thread, threads):
    """Return the first output of a thread and the one after its last: neighbours, whole groups of streams."""
    parts = -(-outputs // STREAMS)
    return parts * thread // threads * STREAMS, min(parts * (thread + 1) // threads * STREAMS, outputs)


@njit
def ask_ahead(weight, apart):
    """Ask for what follows in the streams that are at ``weight`` and multiples of ``apart`` bytes behind."""
    for i in range(STREAMS):
        prefetch(weight + AHEAD + i * apart)
