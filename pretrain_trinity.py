#!/usr/bin/env python3
"""Train a Trinity model: `torchrun --nproc-per-node 2 pretrain_trinity.py --preset tiny ...`."""

from megatron_trinity.errors import run_command
from megatron_trinity.exits import end


def main() -> None:
    from megatron_trinity.training.stop import stopping

    with stopping():  # imports take seconds, and a signal may come in them
        from megatron_trinity.upstream import adapt_megatron

        adapt_megatron()  # before anything imports megatron.training

        from megatron_trinity.training.pretrain import pretrain

        pretrain()


if __name__ == "__main__":
    run_command(main, end)
