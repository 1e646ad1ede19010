"""Checkpoints that are written behind the steps, against those that are written between them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from tests.gpu.machine import Machine
from tests.gpu.rows import Row, at_most, measured
from tests.gpu.runs import Runs, runs, unlike


def rows(machine: Machine) -> Iterator[Row]:
    from tests.trainer import checkpoint_contents

    steps, half = machine.size((20, 10), (4, 2))
    with runs(machine) as folder:
        taken, found = {}, {}
        for name, flags in (("between", ()), ("behind", ("--async-save",))):
            began = time.perf_counter()
            found[name] = save(folder, name, steps, half, *flags)
            taken[name] = time.perf_counter() - began
        yield at_most("steps, bitwise", unlike(found["between"], found["behind"]), 0, "unlike")
        yield measured("a run that saves behind its steps", taken["behind"], "s")
        yield measured("a run that saves between them", taken["between"], "s")
        for iteration in (half, steps):
            one, other = (
                checkpoint_contents(folder.folder / name, iteration)
                for name in ("between", "behind")
            )
            differ = one.keys() ^ other.keys()
            differ |= {
                key for key in one.keys() & other.keys() if not torch.equal(one[key], other[key])
            }
            case = f"checkpoint of step {iteration}, {len(one)} tensors"
            yield at_most(f"{case}, bitwise", len(differ), 0, "tensors unlike")
        rest = folder.train(
            "rest",
            *("--train-iters", str(steps + 1), "--load", str(folder.folder / "behind")),
            "--override-opt_param-scheduler",
        )
        yield at_most("the run goes on from it", abs(1 - len(rest)), 0, "steps missing")


def save(folder: Runs, name: str, steps: int, half: int, *flags: str) -> dict[int, str]:
    return folder.train(
        name,
        *("--train-iters", str(steps), "--deterministic-mode"),
        *("--save", str(folder.folder / name), "--save-interval", str(half), *flags),
    )
