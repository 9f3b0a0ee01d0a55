"""Derive seeds from the place in a run, so that a resume point holds no generator state."""

from __future__ import annotations

BEFORE_STEP = -1
"""The place of the objectives' ``before_step`` among a step's micro batches."""
AFTER_STEP = -2
"""The place of the objectives' ``after_step`` among a step's micro batches."""

VALIDATION = -1
"""The step of validation: the random numbers of an objective are the same each time."""


def place_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Return a 31-bit seed for one micro-step of one process.

    The place is mixed as in SplitMix64, so that the seeds of neighbouring places share nothing.
    """
    value = (((seed * 1_000_003 + step) * 1_000_003 + micro) * 1_000_003 + rank) & (2**64 - 1)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        value = ((value ^ (value >> 30)) * factor) & (2**64 - 1)
    return (value ^ (value >> 31)) & 0x7FFFFFFF
