"""Train in this process, as the only rank: python -m tests.gpu.train FILE [the trainer's flags]

The loss and the gradient norm of each step are appended to FILE, bit by bit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    file, *flags = sys.argv[1:]

    from megatron_trinity.command_line.single_rank import single_rank_environment
    from megatron_trinity.errors import run_command
    from megatron_trinity.upstream import adapt_megatron
    from tests.transformer_engine.worker import PACKAGES, load_emulated

    os.environ |= single_rank_environment()
    if PACKAGES in os.environ:
        load_emulated()
    else:
        adapt_megatron()

    from tests.steps import recording

    def train() -> None:
        from megatron_trinity.training.pretrain import pretrain

        with recording(Path(file)):
            pretrain(flags)

    run_command(train)


if __name__ == "__main__":
    main()
