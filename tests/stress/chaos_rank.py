"""What ranks run under chaos: the trainer, which notes its steps and meets faults put to it.

`CHAOS` names a directory: `steps` gets the losses and the norm of each step, `events` when what
was, and a file `nonfinite` in it has the next step of a rank be not finite.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from megatron_trinity.errors import run_command
from megatron_trinity.exits import end

FOLDER = Path(os.environ["CHAOS"])
RANK = int(os.environ["RANK"])


def note(what: str, **more: Any) -> None:
    """Append an event; in one piece, so that ranks do not mix theirs."""
    event = {"what": what, "rank": RANK, "pid": os.getpid(), "at": time.time(), **more}
    file = os.open(FOLDER / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{json.dumps(event)}\n".encode())
    os.close(file)


def main() -> None:
    note("rank")
    from megatron_trinity.training.stop import stopping

    with stopping():
        from megatron_trinity.upstream import adapt_megatron

        adapt_megatron()
        from megatron.core.utils import unwrap_model
        from megatron.training import training

        from megatron_trinity.training.pretrain import pretrain
        from tests.faults import FAULTS
        from tests.steps import recording

        train_step, begun = training.train_step, False

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            if not begun:
                note("begins", iteration=kwargs["iteration"] + 1)
                begun = True
            with ExitStack() as stack:
                with suppress(FileNotFoundError):
                    fault = json.loads((FOLDER / "nonfinite").read_text())
                    if fault["rank"] == RANK:
                        (FOLDER / "nonfinite").unlink()
                        stack.enter_context(FAULTS[fault["where"]](unwrap_model(args[2][0])))
                return train_step(*args, **kwargs)

        with recording(FOLDER / "steps"):
            log = training.training_log

            def noting(*args: Any, **kwargs: Any) -> Any:
                result = log(*args, **kwargs)
                if int(os.environ["WORLD_SIZE"]) - 1 == RANK:
                    note("step", iteration=args[3])
                return result

            training.train_step, training.training_log = step, noting
            pretrain()


def note_and_end(code: int) -> NoReturn:
    note("left", code=code)
    end(code)


if __name__ == "__main__":
    run_command(main, note_and_end)
