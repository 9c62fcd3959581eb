"""Programs of a launch that wait for each other's messages, and how many may do so."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of one launch, if there are as many multiprocessors: waiting for each other takes that all run at once.
MOST_PROGRAMS = 128
LEAST_ROWS = 16


@triton.jit
def hear_all(message, tag, slots, program, others, known, TAG_BITS: tl.constexpr):
    """Publish a program's message of 64 bits, and wait for those of all, which are given.

    The last ``TAG_BITS`` of each say which exchange it is of. Exchanges take one of two places of ``slots`` in turn,
    since nobody can be two ahead; so their tags have to differ from that of the exchange two before, and from 0.
    """
    tl.debug_barrier()  # what the program wrote before can be read by whoever has heard it
    tl.atomic_xchg(slots + program, (message << TAG_BITS) + tag, sem="release", scope="gpu")
    heard = tl.load(slots + others, mask=known, other=0, volatile=True)
    while tl.max(tl.where(known & ((heard & ((1 << TAG_BITS) - 1)) != tag), 1, 0), axis=0) > 0:
        heard = tl.load(slots + others, mask=known, other=0, volatile=True)
    return heard >> TAG_BITS


def programs_at_once(tensor: Tensor) -> int:
    """How many programs of a launch may wait for each other; Triton's interpreter runs one after the other."""
    if not tensor.is_cuda:
        return 1
    return min(MOST_PROGRAMS, torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def share_rows(n: int, n_samples: int, at_once: int) -> tuple[int, int]:
    """How ``at_once`` programs share the rows of some samples.

    Returns
    -------
    n_programs : int
        For each sample.
    n_rows : int
        Of a program, a power of two.
    """
    n_programs = max(1, min(at_once // n_samples, triton.cdiv(n, LEAST_ROWS)))
    n_rows = max(LEAST_ROWS, triton.next_power_of_2(triton.cdiv(n, n_programs)))
    return triton.cdiv(n, n_rows), n_rows
