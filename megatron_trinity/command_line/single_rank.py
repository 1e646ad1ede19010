"""This process as the only rank."""

from __future__ import annotations

import socket


def single_rank_environment() -> dict[str, str]:
    """The variables that a launcher sets for the only rank of a run, with a port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_single_rank_group() -> None:
    """Adapt Megatron and make torch's default group, of this process over gloo, without a port."""
    import torch

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
