"""Under torchrun: its report ends with our line, and a scheduler's signal reaches the ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.trainer import steps_of, training_flags, write_dataset

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # as docs/training.md has it
LIMIT = 120


def launch(words: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    with open(output, "w") as stream:
        return subprocess.Popen(
            [*TORCHRUN, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_report_of_torchrun_ends_with_our_line(tmp_path: Path, rank: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\n"
        "from megatron_trinity import errors\n"
        "errors.RANK_0_FIRST = 0.5\n"
        "def main():\n"
        f"    if int(os.environ['RANK']) != {rank}:\n"
        f"        time.sleep({LIMIT})\n"
        "    raise errors.UsageError('no such flag')\n"
        "errors.run_command(main)\n"
    )
    launcher = launch([str(program)], tmp_path / "output")
    assert launcher.wait(LIMIT) == 1
    lines = (tmp_path / "output").read_text().strip().splitlines()
    line = "error: no such flag" if rank == 0 else "error on rank 1: no such flag"
    assert line in lines
    assert lines[-2] == f"  traceback : {line}"
    assert set(lines[-1]) == {"="}


def test_a_rank_that_lost_another_is_silent(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, torch.distributed as dist\n"
        "from megatron_trinity import errors\n"
        "def main():\n"
        "    dist.init_process_group('gloo')\n"
        "    if dist.get_rank() == 0:\n"
        "        dist.recv(torch.zeros(1), 1)\n"
        "    errors.RANK_0_FIRST = 0.5\n"
        "    raise errors.TrinityError('nothing to send')\n"
        "errors.run_command(main)\n"
    )
    launcher = launch([str(program)], tmp_path / "output")
    assert launcher.wait(LIMIT) == 1
    output = (tmp_path / "output").read_text()
    assert output.strip().splitlines()[-2].endswith("error on rank 1: nothing to send")
    assert "[rank0]" not in output
    assert "Connection closed" not in output


@pytest.mark.slow
def test_a_signal_that_torchrun_passes_on_saves_and_ends(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    flags = training_flags(
        tmp_path / "data",
        *("--optimizer", "adam", "--train-iters", "100000", "--save", str(tmp_path / "save")),
        *("--save-interval", "100000"),
    )
    output = tmp_path / "output"
    launcher = launch(["--signals_to_handle", PASSED_ON, "pretrain_trinity.py", *flags], output)
    try:
        began = time.monotonic()
        while 3 not in steps_of(tmp_path / "save"):
            assert launcher.poll() is None, output.read_text()
            assert time.monotonic() - began < LIMIT
            time.sleep(0.2)
        os.killpg(launcher.pid, signal.SIGUSR1)
        launcher.wait(LIMIT)
    finally:
        if launcher.poll() is None:
            launcher.terminate()
    [saved] = (tmp_path / "save").glob("iter_*")
    assert (saved / "manifest.json").is_file()
    pointer = (tmp_path / "save/latest_checkpointed_iteration.txt").read_text()
    assert int(pointer) == int(saved.name.removeprefix("iter_")) >= 3
    assert "Unable to shutdown process" not in output.read_text()
