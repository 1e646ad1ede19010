"""Run one subject in this process: python -m tests.gpu.subject NAME FILE [--toy]

Its rows are appended to FILE as they come, so that those of a process that dies are there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path

PACKAGE = "tests.gpu.subjects"


def main() -> None:
    name, file, *rest = sys.argv[1:]
    toy = "--toy" in rest
    if toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # One that is no name of ours is a module of somebody else's.
    module = importlib.import_module(name if "." in name else f"{PACKAGE}.{name}")
    # Ahead of CUDA's start, which reads them.
    os.environ |= getattr(module, "ENVIRONMENT", {})

    from tests.gpu.machine import Machine
    from tests.gpu.rows import append_row, as_toy

    # What Megatron says at its start is not the subject's last line.
    with contextlib.redirect_stdout(sys.stderr):
        for row in module.rows(Machine(toy)):
            append_row(Path(file), as_toy(row) if toy else row)


if __name__ == "__main__":
    main()
