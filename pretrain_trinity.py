#!/usr/bin/env python3
"""Train a Trinity model: `torchrun --nproc-per-node 2 pretrain_trinity.py --preset tiny ...`."""

import gc

from megatron_trinity.errors import run_command
from megatron_trinity.exits import end


def main() -> None:
    from megatron_trinity.training.stop import stopping

    with stopping():  # imports take seconds, and a signal may come in them
        gc.disable()  # what they make stays: looking it through is a seventh of their time
        from megatron_trinity.upstream import adapt_megatron

        adapt_megatron()  # before anything imports megatron.training

        from megatron_trinity.training.pretrain import pretrain

        gc.freeze()
        gc.enable()
        pretrain()


if __name__ == "__main__":
    run_command(main, end)
