"""Many requests of changing shapes: memory stays where it is."""

from __future__ import annotations

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from live_server import about, asked, image_part, in_threads, scene_url  # noqa: F401


def rss():
    """MiB that the process holds."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024
