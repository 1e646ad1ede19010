"""A rank that dies, is suspended or sleeps ends the run within seconds, and is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_trinity import exits
from megatron_trinity.errors import Stopped, TrinityError
from megatron_trinity.training import watch as watch_module
from megatron_trinity.training.stuck import Stuck, behind
from megatron_trinity.training.watch import Watch
from tests.distributed.test_launcher import LIMIT, launch
from tests.trainer import events_of, steps_of, training_flags, write_dataset


def test_who_is_behind() -> None:
    waiting = Stuck(0, 7, "all_reduce", "balance.py:99 in balance_experts")
    busy = Stuck(1, 7, "", "batch.py:12 in next_batch")
    late = Stuck(2, 6, "broadcast", "batch.py:30 in shared")
    assert behind({0: waiting, 1: busy}, {}) == (
        "the others wait for rank 1 at batch.py:12 in next_batch"
    )
    assert behind({0: waiting, 1: busy, 2: late}, {}) == (
        "the others wait for rank 2 waits in broadcast, at batch.py:30 in shared"
    )
    assert behind({0: waiting, 1: busy}, {5: "process 9 on moon since then"}) == (
        "no sign of life from rank 5 (process 9 on moon since then)"
    )
    assert behind({0: waiting, 3: waiting}, {}).startswith("no rank is behind: rank 0 waits in ")


def test_a_store_that_is_gone_ends_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher had it, and its end is for all ranks to leave behind a step."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=5))
    watch = Watch(Namespace(hang_minutes=0, run_dir=None, save=None, tensorboard_dir=None), client)
    del server
    watch._store.set("gone", "")  # which the socket still takes
    with pytest.raises(dist.DistNetworkError):
        watch._store.set("gone", "")
    monkeypatch.setattr(watch_module, "CAUSE", 0.5)

    def fail() -> None:
        with watch.watching():
            watch.step_begins(1)
            raise RuntimeError("a connection is lost")

    with pytest.raises(RuntimeError, match="a connection is lost"):
        fail()


@pytest.mark.parametrize("error", [TrinityError, RuntimeError])
def test_an_error_that_follows_from_the_end_of_a_rank_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Such as of a save, in which another rank has died."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch = Watch(Namespace(hang_minutes=0, run_dir=None, save=None, tensorboard_dir=None), store)
    monkeypatch.setattr(watch_module, "CAUSE", 0.5)

    def fail() -> None:
        with watch.watching():
            watch.step_begins(7)
            watch._store.set("cause", "rank 1 was killed in iteration 7")
            raise error("the checkpoint could not be saved: Connection closed by peer")

    with pytest.raises(Stopped, match="error: rank 1 was killed in iteration 7; all ranks") as told:
        fail()
    assert told.value.exit_code == exits.PEER_LOST


PROGRAM = """
import os, sys, time
from megatron_trinity.errors import run_command

def main():
    from megatron_trinity.training.stop import stopping
    with stopping():
        from megatron_trinity.upstream import adapt_megatron
        adapt_megatron()
        from megatron_trinity.training import pretrain
        step = pretrain.forward_step
        def slow(*args, **kwargs):
            if os.path.exists({mark!r}) and os.environ["RANK"] == "1":
                {body}
            return step(*args, **kwargs)
        pretrain.forward_step = slow
        pretrain.pretrain()

run_command(main)
"""
FAULTS = {
    "killed": "os.kill(os.getpid(), 9)",
    "suspended": "os.kill(os.getpid(), 19)",
    "asleep": "time.sleep(600)",
    "raises": "raise ZeroDivisionError('a bug')",
}


def launch_with(
    fault: str, folder: Path, *more: str
) -> tuple[subprocess.Popen[bytes], Path, Path, Path]:
    """A run whose rank 1 meets the fault when the mark is there: launcher, mark, run and output."""
    write_dataset(folder / "data")
    mark, run, output = folder / "mark", folder / "run", folder / "output"
    program = folder / "program.py"
    program.write_text(PROGRAM.format(mark=str(mark), body=FAULTS[fault]))
    flags = training_flags(
        folder / "data",
        *("--optimizer", "adam", "--train-iters", "100000", "--save", str(run)),
        *("--save-interval", "100000", *more),
    )
    return launch([str(program), *flags], output), mark, run, output


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_takes_the_run_with_it(tmp_path: Path, fault: str) -> None:
    launcher, mark, run, output = launch_with(fault, tmp_path, "--hang-minutes", "0.1")
    try:
        _wait_for_iteration(3, launcher, output, run)
        mark.touch()
        began = time.monotonic()
        assert launcher.wait(LIMIT) == 1
        assert time.monotonic() - began < 30
    finally:
        if launcher.poll() is None:
            launcher.terminate()
    text = output.read_text()
    assert not list(run.glob("iter_*"))  # survivors save nothing
    if fault != "suspended":  # the last rank is silent then, and another one has killed it
        [alarm] = events_of(run, "alarm")
        assert alarm["what"] == ("hang" if fault == "asleep" else "rank lost")
        assert alarm["line"] in text
    assert text.count("Traceback (most recent call last)") == (2 if fault == "raises" else 1)
    if fault in ("killed", "raises"):
        [line] = [line for line in text.splitlines() if line.startswith("error: rank 1")]
        how = (
            r", in iteration \d+: ZeroDivisionError: a bug"
            if fault == "raises"
            else (r" \(process \d+ on .*\) was killed in iteration \d+")
        )
        assert re.fullmatch(f"error: rank 1{how}; all ranks end, and nothing is saved", line)
    else:
        [line] = [line for line in text.splitlines() if "error: no step for" in line]
        what = (
            "no sign of life from rank 1 (process "
            if fault == "suspended"
            else ("the others wait for rank 1 at program.py:")
        )
        assert what in line
        if fault == "asleep":  # of one that is killed torchrun may hear first, and tell no other
            assert f"exitcode  : {exits.HUNG} " in text
        assert "step_then_hook" in (run / "hang/rank-0.txt").read_text()
        assert (run / "hang/rank-1.txt").exists() == (fault == "asleep")


@pytest.mark.slow
def test_the_end_of_the_launcher_saves_and_ends(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run, output = tmp_path / "run", tmp_path / "output"
    flags = training_flags(
        tmp_path / "data",
        *("--optimizer", "adam", "--train-iters", "100000", "--save", str(run)),
        *("--save-interval", "100000"),
    )
    launcher = launch(["pretrain_trinity.py", *flags], output)
    _wait_for_iteration(3, launcher, output, run)
    [file] = run.glob(".held_*")
    launcher.kill()
    launcher.wait()
    began = time.monotonic()
    while file.exists():
        assert time.monotonic() - began < LIMIT
        time.sleep(0.1)
    [saved] = run.glob("iter_*")
    assert (saved / "manifest.json").is_file()
    assert "stopped by the end of its launcher behind iteration" in output.read_text()


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    launcher, mark, run, output = launch_with("asleep", tmp_path)
    try:
        _wait_for_iteration(2, launcher, output, run)
        mark.touch()
        pid = int(json.loads(next(run.glob(".held_*")).read_text())["pid"])
        time.sleep(1)
        began = time.monotonic()
        for _ in range(2):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.5)
        launcher.wait(LIMIT)
        assert time.monotonic() - began < 20
    finally:
        if launcher.poll() is None:
            launcher.terminate()
    assert "interrupted twice: this run leaves at once" in output.read_text()
    assert f"exitcode  : {exits.of_signal(signal.SIGINT)} " in output.read_text()


def _wait_for_iteration(
    number: int, launcher: subprocess.Popen[bytes], output: Path, run: Path
) -> None:
    began = time.monotonic()
    while number not in steps_of(run):
        assert launcher.poll() is None, output.read_text()
        assert time.monotonic() - began < LIMIT
        time.sleep(0.2)
