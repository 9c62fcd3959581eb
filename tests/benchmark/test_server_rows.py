"""What the benchmark of the server stores and shows."""

import pytest
from benchmark.server_rows import read_server, server_table


def test_the_last_run_is_shown():
    row = {
        "clients": "8", "requests": "48", "max_tokens": "24", "model": "bundled", "one_requests_per_second": "1.5",
        "one_tokens_per_second": "30", "one_batch": "1.0", "several_requests_per_second": "3.0",
        "several_tokens_per_second": "60", "several_batch": "7.5", "ratio": "2.0", "device": "D", "threads": "2",
        "versions": "torch 2", "commit": "c", "timestamp": "2",
    }  # fmt: skip
    lines = server_table([row, {**row, "timestamp": "1", "ratio": "9.0"}]).splitlines()
    assert lines[2:5] == ["| 1 | 1.5 | 30 | 1.0 |", "| 8 | 3.0 | 60 | 7.5 |", "| **ratio** | **2.0** | | |"]
    assert "48 requests each" in lines[-1]
    assert server_table([]).startswith("No row yet")


def test_stored_rows_say_where_they_come_from():
    for row in read_server():
        assert len(row["commit"]) == 40
        assert row["command"].startswith("python -m benchmark.bench_server")
        assert float(row["ratio"]) == pytest.approx(
            float(row["several_requests_per_second"]) / float(row["one_requests_per_second"]), abs=0.006
        )
