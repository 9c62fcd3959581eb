"""Many requests of changing shapes, some of them faulty: memory stays where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

N_FIRST = 8  # windows in which the process grows to what its largest batches need
N_COMPARED = 4  # at both ends: what is kept for lengths rises and falls within three windows
MOST_MIB = 2.0  # that a window of 36 requests may add


def growth(windows):
    """MiB that a window adds, between the medians of the first and of the last few."""
    mib = [one["mib"] for one in windows]
    return (median(mib[-N_COMPARED:]) - median(mib[:N_COMPARED])) / (len(mib) - N_COMPARED)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(1200)
def test_memory_stays_where_it_is():
    """Resident memory as the system counts it, under what ``sparsevlm serve`` sets; a planted leak is seen.

    oneDNN's caches of compiled shapes are bounded by their number, which as it is set takes longer to reach than a
    test may last: here they hold a few, so that the rest is seen.

    What is free is not given back to the system before it is looked at, so the first windows grow to the most that was
    needed at once. On two cores with AMX, one thread of torch's, a run went from 613 to 660, 687 and 693 MiB in
    windows 1, 2, 5 and 12 and back to 682 in the 14th; one with longer texts from 637 to 711 in window 5, and then lay
    between 698 and 732 to the 22nd; another lay between 718 and 747 in 68 windows and ended at 731. Twelve windows, of
    which one run went from 666 to 705, are too few to tell such a step from a rise.
    """
    script = Path(__file__).parent / "soaked.py"
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
    environment.pop("MALLOC_ARENA_MAX", None)
    done = subprocess.run([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, check=True)
    windows = [json.loads(line) for line in done.stdout.splitlines()]
    print(*windows, sep="\n")
    clean = [one for one in windows if not one["leaky"]]
    assert clean[-1]["answers"] > 300
    assert clean[-1]["objects"] - clean[1]["objects"] < 500
    assert growth(clean[N_FIRST:]) < MOST_MIB
    assert growth(windows[len(clean) - N_COMPARED :]) > MOST_MIB
