"""The environment of the only rank of a run."""

from __future__ import annotations

import socket

from megatron_trinity.command_line.single_rank import single_rank_environment


def test_the_port_is_free() -> None:
    found = single_rank_environment()
    assert {found["RANK"], found["LOCAL_RANK"]} == {"0"}
    assert {found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]} == {"1"}
    with socket.socket() as listener:
        listener.bind((found["MASTER_ADDR"], int(found["MASTER_PORT"])))
