"""What libraries keep is bounded before they are loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("fastapi")

ARENAS = """
import ctypes, threading
from sparsevlm.server.memory import bound_memory
bound_memory()
libc, barrier = ctypes.CDLL(None), threading.Barrier(8)
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
def work():
    assert libc.malloc(5000)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
[one.start() for one in threads], [one.join() for one in threads]
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w")))
libc.fflush(None)
"""
SERVE = """
import os, sys
from sparsevlm.__main__ import main
from sparsevlm.server import memory
bound = memory.bound_memory
def seen():
    bound()
    said = os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]
    print(*said, "torch" in sys.modules, flush=True)
    os._exit(0)
memory.bound_memory = seen
sys.argv = ["sparsevlm", "serve", "--model", "bundled"]
main()
"""


def ran(script, **environment):
    ours = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**inherited, **environment}, stdout=subprocess.PIPE, check=True, text=True
    )
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(
    ("environment", "most"),
    [({}, 2), ({"MALLOC_ARENA_MAX": "4"}, 4), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, 4)],
)
def test_threads_share_few_heaps_unless_the_environment_says_more(environment, most):
    assert len(re.findall("<heap ", ran(ARENAS, **environment))) == most


def test_the_command_bounds_them_before_torch_is_imported():
    assert ran(SERVE).split() == ["128", "128", "False"]
    assert ran(SERVE, LRU_CACHE_CAPACITY="7").split() == ["128", "7", "False"]
