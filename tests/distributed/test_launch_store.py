"""Ranks of one start find each other in a store that has what those before them have written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_trinity.errors import TrinityError
from megatron_trinity.training.launch_store import fresh
from tests.distributed.test_launcher import LIMIT
from tests.paths import ROOT


@pytest.mark.parametrize("last", [0, 2])
def test_each_start_has_a_part_of_its_own(last: int) -> None:
    """Whichever rank comes last, and though ranks of the start before have asked in vain."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as executor:
        # Of a start that is killed before its rank 0 has come.
        for rank in (1, 2):
            with pytest.raises(TrinityError, match="rank 0 has not come within"):
                fresh(store, rank, 3, 0.06)
        for start in range(2):
            first = [
                executor.submit(fresh, store, rank, 3, LIMIT) for rank in range(3) if rank != last
            ]
            time.sleep(0.1)
            assert not any(future.done() for future in first if last == 0)
            parts = [fresh(store, last, 3, LIMIT), *(future.result() for future in first)]
            assert not any(part.check(["key"]) for part in parts)
            parts[0].set("key", str(start))
            assert [part.get("key") for part in parts] == [str(start).encode()] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TrinityError, match="rank 1 has not come within"):
        fresh(dist.HashStore(), 0, 2, 0.06)


PROGRAM = """
import os, sys, time
import torch, torch.distributed as dist
from megatron_trinity.training.launch_store import launch_store

rank, count = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
store = launch_store(1.0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
value = torch.ones(1)
dist.all_reduce(value)
print(f"rank {rank} of restart {count} has {value.item():g}", flush=True)
mark = sys.argv[1]
if not os.path.exists(mark):
    dist.barrier()
    if rank == 1:
        open(mark, "w").close()
        os._exit(1)
    time.sleep(60)  # its own torchrun hears that the other node comes anew
"""


@pytest.mark.slow
def test_nodes_that_count_their_restarts_differently(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    port = str(29000 + os.getpid() % 1000)
    outputs = [tmp_path / f"node-{node}" for node in range(2)]
    nodes = []
    for output in outputs:
        words = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        words += ["--local-addr", "127.0.0.1", str(program), str(tmp_path / "mark")]
        with open(output, "w") as stream:
            nodes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *words],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        assert [node.wait(LIMIT) for node in nodes] == [0, 0], [o.read_text() for o in outputs]
    finally:
        for node in nodes:
            node.kill()
    text = "".join(output.read_text() for output in outputs)
    said = sorted(line for line in text.splitlines() if " of restart " in line)
    assert len(said) == 4
    assert {line.split()[-1] for line in said} == {"2"}
    # What makes the name of a start necessary.
    assert {line.split()[4] for line in said} == {"0", "1"}
    assert [line for line in said if line.startswith("rank 0")][1].split()[4] == "0"
