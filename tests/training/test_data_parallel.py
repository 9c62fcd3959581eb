"""Several processes: each learns from data of its own, and all have the same weights after each step."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from training.adapters import LowRank
from training.data_parallel import DataParallel
from training.drawn.packing import Limits
from training.drawn.stream import DrawnBatches, parse_drawn
from training.optimiser import Optimiser, Trained
from training.replay import TextReplay
from training.smol.model import SmolModel
from training.smol.settings import SmolSettings
from training.smol.train import train

pytest.importorskip("gguf")

CPU = torch.device("cpu")
WORLD_SIZE = 2
TEXTS = [f"The text number {i}.\n\nIt is long enough: " + "in the " * 60 for i in range(12)]
SETTINGS = SmolSettings(
    mix="small:1",
    questions=1,
    tail=160,
    tower_depth=6,
    steps=2,
    lora_rank=2,
    replay_windows=1,
    replay_length=24,
    text_windows=2,
    drawn="reading:1",
    drawn_tokens=1408,
    drawn_longest=704,
    drawn_questions=2,
)


def in_processes(work: Callable[[int], object], folder: Path) -> list[object]:
    """What ``work`` returns in each of two forked processes, as ``torchrun`` would start them."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    shared = {"WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.save(work(rank), folder / f"{rank}.pt")

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * WORLD_SIZE
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def optimised(parallel: DataParallel, gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Weights after a step with each of ``gradients``."""
    torch.manual_seed(0)
    matrix, low, bias = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((6, 5), (4, 3), (3,)))
    trained = Trained([matrix], [bias], [LowRank({"low": low}, 2, 1.0, {})])
    optimiser = Optimiser(trained, decay=0.1, clip=1.0, parallel=parallel)
    optimiser.rate.fill_(0.1)
    optimiser.matrix_rate.fill_(0.1)
    for step in gradients:
        optimiser.step(step)
    return [weight.detach() for weight in (matrix, bias, low)]


def test_a_step_is_that_of_the_mean_gradient(tmp_path):
    torch.manual_seed(1)
    gradients = torch.randn(WORLD_SIZE, 3, 6 * 5 + 3 + 4 * 3)

    def split(rows: torch.Tensor) -> list[list[torch.Tensor]]:
        shapes = ((6, 5), (3,), (4, 3))
        return [[g.view(s) for g, s in zip(row.split([30, 3, 12]), shapes, strict=True)] for row in rows]

    def work(rank: int) -> object:
        parallel, _ = DataParallel.begin(CPU)
        weights, told = optimised(parallel, split(gradients[rank])), parallel.agreed(0.5 + rank)
        parallel.end()
        return [*weights, torch.tensor(told)]

    first, second = in_processes(work, tmp_path)
    expected = optimised(DataParallel(), split(gradients.mean(0)))
    torch.testing.assert_close(first, [*expected, torch.tensor(0.5)])
    for here, there in zip(first, second, strict=True):
        assert torch.equal(here, there)


def test_a_run_in_two_processes_ends_with_the_same_weights(tmp_path, decoder):
    def work(rank: int) -> object:
        out = tmp_path / f"out-{rank}"
        models = []
        begin = SmolModel.__init__

        def kept(self, *arguments):
            begin(self, *arguments)
            models.append(self)

        SmolModel.__init__ = kept
        result = train(SETTINGS, out, 0, CPU, decoder, TEXTS)
        assert (result is None) == (rank != 0)
        assert out.exists() == (rank == 0)
        return [weight.detach() for weight in models[0].model.parameters()]

    first, second = in_processes(work, tmp_path)
    assert all(torch.equal(here, there) for here, there in zip(first, second, strict=True))
    started = SmolModel(SETTINGS, CPU, torch.float32, decoder).model.parameters()
    assert not all(torch.equal(here, there) for here, there in zip(first, started, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "out-0" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["processes"] == WORLD_SIZE
    assert rows[-1]["steps"] == 2


def test_processes_take_pictures_and_text_of_their_own(decoder):
    smol = SmolModel(SETTINGS, CPU, torch.float32, decoder)
    limits = Limits(1408, 8, 704)
    words = ["alpha", "beta", "gamma", "delta"]
    mix = parse_drawn("reading:1")
    ranks = [DataParallel(rank, WORLD_SIZE) for rank in range(WORLD_SIZE)]
    seen: list[set[bytes]] = []
    for parallel in ranks:
        batches = DrawnBatches(mix, smol.tokenizer, limits, words, 2, 0, parallel)
        seen.append({batch.patches.tobytes() for batch in itertools.islice(batches, 3)})
    assert len(seen[0]) == len(seen[1]) == 3
    assert not seen[0] & seen[1]
    windows = torch.arange(3, 3 + 4 * 8).view(4, 8)
    text = smol.model.model.language_model
    for parallel, expected in zip(ranks, ([0], [1]), strict=True):
        replay = TextReplay(text, smol.original, windows, 1, 1.0, parallel=parallel)
        assert replay._next.tolist() == expected
        with torch.no_grad():
            replay.loss()
        assert replay._next.tolist() == [expected[0] + WORLD_SIZE]
    with pytest.raises(ValueError, match="4 windows of text are too few for 6 in a step"):
        TextReplay(text, smol.original, windows, 3, 1.0, parallel=ranks[0])
