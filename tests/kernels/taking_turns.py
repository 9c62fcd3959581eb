"""Programs of a launch in Triton's interpreter that take turns, where it would run one after the other.

Each program is a thread, of which one runs at a time. One that comes to wait for the others' messages gives its turn
to a drawn one that can go on: so a program may be as far ahead of another as the messages let it, as on a GPU.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class Turns:
    """Turns of the programs of one launch.

    Parameters
    ----------
    n_programs : int
    seed : int
        Of what is drawn.
    """

    def __init__(self, n_programs: int, seed: int) -> None:
        self._draw = random.Random(seed)
        self._changed = threading.Condition()
        self._waiting: dict[int, Callable[[], bool]] = {program: lambda: True for program in range(n_programs)}
        self._whose: int | None = None
        self._own = threading.local()
        self._errors: list[BaseException] = []

    def run(self, programs: list[Callable[[], None]]) -> None:
        """Runs all to their end; raises what one of them raised."""
        threads = [threading.Thread(target=self._run_one, args=one, daemon=True) for one in enumerate(programs)]
        for thread in threads:
            thread.start()
        with self._changed:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def wait(self, ready: Callable[[], bool]) -> None:
        """Gives the turn of the program that calls away, until it is ready and drawn."""
        with self._changed:
            self._waiting[self._own.program] = ready
            self._pass_on()
            self._come_to_turn()

    def _run_one(self, program: int, function: Callable[[], None]) -> None:
        self._own.program = program
        try:
            with self._changed:
                self._come_to_turn()
            function()
            with self._changed:
                self._pass_on()
        except BaseException as error:
            with self._changed:
                self._errors.append(error)
                self._changed.notify_all()

    def _come_to_turn(self) -> None:
        while self._whose != self._own.program:
            if self._errors:
                raise RuntimeError("another program failed")
            self._changed.wait()
        del self._waiting[self._own.program]

    def _pass_on(self) -> None:
        ready = [program for program, is_ready in self._waiting.items() if is_ready()]
        assert ready or not self._waiting, "all programs wait for each other"
        self._whose = self._draw.choice(ready) if ready else None
        self._changed.notify_all()


class TakingTurns:
    """Lets the launches of a module's kernels take turns.

    Parameters
    ----------
    monkeypatch : pytest.MonkeyPatch
    module : module
        Of ``kernels.triton``; it asks :mod:`.exchange`.
    n_programs : int
        How many may wait for each other.
    seed : int
    """

    def __init__(self, monkeypatch, module, n_programs: int, seed: int) -> None:
        self.most_programs, self._seed, self._call = 0, seed, interpreter.GridExecutor.__call__
        monkeypatch.setattr(module, "programs_at_once", lambda tensor: n_programs)
        monkeypatch.setattr(module, "hear_all", self._hear_all)

        def launch(executor, *given, **named):
            return self._launch(executor, *given, **named)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)

    def _launch(self, executor, *given, **named):
        function, grid, programs = executor.fn, executor.grid, []
        n_programs = int(np.prod(grid))

        def noted(**args):
            programs.append((interpreter.interpreter_builder.grid_idx, args))
            if len(programs) == n_programs:
                self._run(function, programs)

        def begin(args):
            executor.fn = noted  # what looks at the kernel itself has been done
            return grid

        executor.grid = begin
        return self._call(executor, *given, **named)

    def _run(self, function, programs) -> None:
        self.most_programs = max(self.most_programs, len(programs))
        self._turns, self._places = Turns(len(programs), self._seed), threading.local()

        def program(place, args):
            self._places.own = place
            interpreter.interpreter_builder.set_grid_idx(*place)
            function(**args)

        self._turns.run([lambda place=place, args=args: program(place, args) for place, args in programs])

    def _hear_all(self, message, tag, slots, program, others, known, bits):
        """As :func:`sparsevlm.kernels.triton.exchange.hear_all`."""
        tl.atomic_xchg(slots + program, (message << bits) + tag, sem="release", scope="gpu")

        def heard():
            return tl.load(slots + others, mask=known, other=0, volatile=True)

        def has_all():
            is_there = (heard() & ((1 << bits) - 1)) == tag
            return bool(is_there.handle.data[known.handle.data].all())

        self._turns.wait(has_all)
        interpreter.interpreter_builder.set_grid_idx(*self._places.own)
        return heard() >> bits
