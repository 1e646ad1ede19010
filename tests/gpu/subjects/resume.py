"""Bit by bit with `--deterministic-mode`: two runs, and one that is stopped and goes on."""

from __future__ import annotations

from collections.abc import Iterator

from tests.gpu.machine import Machine
from tests.gpu.rows import Row, at_most, measured
from tests.gpu.runs import apart, runs, unlike

EXACT = "--deterministic-mode"
OPTIMIZERS = ("muon", "adam")


def rows(machine: Machine) -> Iterator[Row]:
    steps, half = machine.size((20, 10), (4, 2))
    with runs(machine) as folder:
        for optimizer in OPTIMIZERS[: machine.size(2, 1)]:
            flags = ("--optimizer", optimizer, "--train-iters", str(steps))
            whole = folder.train(f"{optimizer}-whole", *flags, EXACT)
            again = folder.train(f"{optimizer}-again", *flags, EXACT)
            yield at_most(
                f"{optimizer}: two runs, bitwise", unlike(whole, again), 0, "steps unlike"
            )
            saved = str(folder.folder / f"{optimizer}-saved")
            stops = ("--save", saved, "--save-interval", str(half), "--exit-interval", str(half))
            folder.train(f"{optimizer}-half", *flags, EXACT, *stops)
            rest = folder.train(f"{optimizer}-rest", *flags, EXACT, "--load", saved)
            yield at_most(f"{optimizer}: resumed, bitwise", unlike(whole, rest), 0, "steps unlike")
            missing = len(range(half + 1, steps + 1)) - len(rest)
            yield at_most(f"{optimizer}: steps behind the stop", abs(missing), 0, "steps missing")
            free = [folder.train(f"{optimizer}-free-{run}", *flags) for run in range(2)]
            yield measured(
                f"{optimizer}: two runs without {EXACT}",
                apart(*free),
                "largest relative difference of losses",
            )
