"""Losses of a run in each recipe of FP8 beside those in bf16."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from statistics import mean

from tests.gpu.emulated import find_emulated
from tests.gpu.machine import Machine
from tests.gpu.rows import Row, at_most, measured, skipped
from tests.gpu.runs import RefusedError, Steps, loss_of, runs
from tests.paths import ROOT

TE = ("--transformer-impl", "transformer_engine", "--moe-grouped-gemm")
"""The layers that FP8 is of, which a GPU has by default."""
FLAG = "--precision"
APART = 0.02
"""Nats between the means of the last steps."""


def rows(machine: Machine) -> Iterator[Row]:
    recipes = known_recipes()[: machine.size(None, 2)]
    if not recipes:
        yield skipped("losses of each recipe", f"no {FLAG} in this version")
        return
    steps = machine.size(200, 3)
    layers = TE if machine.toy and find_emulated() else ()
    with runs(machine) as folder:
        flags = ("--optimizer", "muon", "--train-iters", str(steps), *layers)
        usual = last(folder.train("bf16", *flags), steps)
        yield measured("bf16: mean of the last steps", usual, "nats")
        for recipe in recipes:
            try:
                found = last(folder.train(recipe, *flags, FLAG, recipe), steps)
            except RefusedError as why:  # a card that lacks it, or no Transformer Engine
                yield skipped(f"{recipe}: off bf16", str(why))
                continue
            yield at_most(f"{recipe}: off bf16", abs(found - usual), APART, "nats")


def last(steps: Steps, number: int) -> float:
    """The mean of the last tenth."""
    return mean(loss_of(steps[step]) for step in range(number - number // 10, number + 1))


def known_recipes() -> list[str]:
    """The values of the trainer's flag that name FP8, from its `--help`."""
    command = [sys.executable, "pretrain_trinity.py", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = re.search(rf"{FLAG} \{{([^}}]*)\}}", text)
    values = re.split(r"[,\s]+", found.group(1)) if found else []
    return [value for value in values if "fp8" in value]
