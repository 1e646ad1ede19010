"""Saves in the background: the values of their step, and whole at every way to end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_trinity import exits
from megatron_trinity.checkpoint.whole.manifest import MANIFEST
from megatron_trinity.upstream.checkpoint_sums import take_sums
from tests.checkpoints import check_whole
from tests.distributed.pool import RankPools
from tests.distributed.test_whole_checkpoints import (
    POINTER,
    STEPS,
    Outcome,
    flags_of,
    listing,
    train,
)
from tests.steps import recorded
from tests.trainer import checkpoint_contents, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    write_dataset(folder / "data")
    return folder


def saved_while_changed(rank: int, world_size: int, folder: Path, persistent: bool) -> bool:
    """Whether a save has the values of when it began, though they change before they are written.

    The writer waits until they have changed.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    writer, changed = filesystem_async.FileSystemWriterAsync, folder / "changed"
    write = writer.write_preloaded_data

    def write_later(*args: Any, **kwargs: Any) -> Any:
        while not changed.exists():
            time.sleep(0.01)
        return write(*args, **kwargs)

    parts = dict(zip("abc", torch.randn(3, 5), strict=True))
    parts["d"] = torch.randn(4)  # a whole storage; the others are views
    before = {name: part.clone() for name, part in parts.items()}
    tensors = {
        name: ShardedTensor.from_rank_offsets(name, part, replica_id=rank)
        for name, part in parts.items()
    }
    (folder / "save").mkdir(exist_ok=True)
    writer.write_preloaded_data = staticmethod(write_later)
    filesystem_async.get_write_results_queue("fork")
    try:
        calls = async_utils.AsyncCallsQueue(persistent=persistent)
        if persistent:
            calls.warmup_persistent_caller(rank, mp_mode="fork")
        request = dist_checkpointing.save(
            tensors, str(folder / "save"), async_sharded_save=True, async_strategy="mcore"
        )
        calls.schedule_async_request(request)
        for part in parts.values():
            part += 1
        changed.touch()
        calls.close()
    finally:
        writer.write_preloaded_data = staticmethod(write)
        filesystem_async._results_queue = None
    read = dist_checkpointing.load(tensors, str(folder / "save"))
    return all(torch.equal(read[name], before[name]) for name in before)


@pytest.mark.parametrize("persistent", [False, True])
def test_values_are_those_of_the_moment(ranks: RankPools, tmp_path: Path, persistent: bool) -> None:
    assert ranks.run(saved_while_changed, tmp_path, persistent, world_size=1) == [True]


def saved_by_a_new_process(rank: int, world_size: int, folder: Path) -> tuple[bool, list[str]]:
    """Whether a worker that has imported everything itself saves, and the files that it summed."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    tensors = {"a": ShardedTensor.from_rank_offsets("a", torch.arange(4.0), replica_id=rank)}
    filesystem_async.get_write_results_queue("fork")
    calls = async_utils.AsyncCallsQueue(persistent=True)
    calls.warmup_persistent_caller(rank, mp_mode="spawn")
    try:
        request = dist_checkpointing.save(
            tensors, str(folder), async_sharded_save=True, async_strategy="mcore"
        )
        calls.schedule_async_request(request)
        calls.close()
    finally:
        filesystem_async._results_queue = None
    read = dist_checkpointing.load(tensors, str(folder))
    return torch.equal(read["a"], torch.arange(4.0)), list(take_sums(folder))


@pytest.mark.slow
def test_a_worker_is_adapted(ranks: RankPools, tmp_path: Path) -> None:
    result = ranks.run(saved_by_a_new_process, tmp_path, world_size=1)
    assert result == [(True, ["__0_0.distcp"])]


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_fork_ends_with_its_parent() -> None:
    """However that ends; else it would write into what the next start saves."""
    program = """if True:
        import os, signal, time
        from megatron_trinity.upstream.cpu.async_saves import until_parent_ends
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            until_parent_ends(parent, lambda: (print("ready", flush=True), time.sleep(60)))
        time.sleep(0.5)
        print(child, flush=True)
        os.kill(parent, signal.SIGKILL)
    """
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, check=False, timeout=30)
    assert ended.returncode == -signal.SIGKILL
    ready, child = ended.stdout.split()
    assert ready == b"ready"
    # The pipe of its output has closed in time, so it has ended, or is about to.
    deadline = time.monotonic() + 30
    while is_running(int(child)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dead_worker(rank: int, world_size: int) -> str:
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncCallsQueue,
        AsyncRequest,
    )

    calls = AsyncCallsQueue(persistent=True)
    calls.warmup_persistent_caller(rank, mp_mode="fork")
    calls.schedule_async_request(AsyncRequest(partial(time.sleep, 60), (0, [], None), []))
    caller: Any = AsyncCallsQueue._persistent_caller
    os.kill(caller.process.pid, signal.SIGKILL)
    try:
        calls.maybe_finalize_async_calls(blocking=True)
    except Exception as error:
        return str(error)
    finally:
        calls.async_calls.clear()
        caller.close(abort=True)
        AsyncCallsQueue._persistent_caller = None
    return ""


def test_a_worker_that_has_ended_is_an_error(ranks: RankPools) -> None:
    assert ranks.run(dead_worker, world_size=1) == ["the process that writes checkpoints has ended"]


def train_and_end(rank: int, world_size: int, flags: Sequence[str], how: str) -> Outcome:
    """Train, and end by `how`; every write takes a while."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import training

    writer = filesystem_async.FileSystemWriterAsync
    write = writer.write_preloaded_data

    def write_slowly(*args: Any, **kwargs: Any) -> Any:
        if how == "signal" and "iter_0000002" in str(kwargs["write_bucket"][0]):
            os.killpg(0, signal.SIGTERM)  # all processes of the rank, as a scheduler does
        time.sleep(0.5)
        if how == "full disk" and "iter_0000002" in str(kwargs["write_bucket"][0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args, **kwargs)

    writer.write_preloaded_data = staticmethod(write_slowly)
    step = training.train_step

    def step_and_end(*args: Any, **kwargs: Any) -> Any:
        # Before the first step a rank would leave alone, and at once.
        if how == "signal" and rank == 0 and kwargs["iteration"] == 1:
            os.killpg(0, signal.SIGTERM)
        if how == "duration":
            training._TRAIN_START_TIME -= 60
        return step(*args, **kwargs)

    training.train_step = step_and_end
    try:
        return train(rank, world_size, flags)
    finally:
        writer.write_preloaded_data = staticmethod(write)
        training.train_step = step


ENDS: dict[str, tuple[list[str], int, int]] = {
    "normal": ([], 4, exits.DONE),
    "normal, between saves": (["--save-interval", "3"], 4, exits.DONE),
    "interval": (["--exit-interval", "2"], 2, exits.DONE),
    "duration": (["--exit-duration-in-mins", "1"], 1, exits.OUT_OF_TIME),
    "signal": ([], 2, exits.of_signal(signal.SIGTERM)),
}


@pytest.mark.parametrize("how", ENDS)
def test_however_it_ends_the_newest_is_whole(
    ranks: RankPools, folder: Path, tmp_path: Path, how: str
) -> None:
    flags, newest, code = ENDS[how]
    world_size = 2 if how in ("normal", "signal") else 1
    run = tmp_path / "run"
    words = [*flags_of(folder, run), "--async-save", *flags]
    outcomes = ranks.run(train_and_end, words, how, world_size=world_size)
    assert [outcome[:2] for outcome in outcomes] == [(code, "")] * world_size
    assert (run / POINTER).read_text() == str(newest)
    check_whole(run / f"iter_{newest:07d}", checksums=True)


def test_it_is_what_a_save_in_the_foreground_is(
    ranks: RankPools, folder: Path, tmp_path: Path
) -> None:
    for name, flags in {"sync": [], "async": ["--async-save"]}.items():
        words = [*flags_of(folder, tmp_path / name), *flags]
        outcome = ranks.run(train, words, tmp_path / f"{name} steps", world_size=2)[1]
        assert outcome[:2] == (0, "")
    assert recorded(tmp_path / "sync steps") == recorded(tmp_path / "async steps")
    for step in range(1, STEPS + 1):
        sync, background = (
            checkpoint_contents(tmp_path / name, step) for name in ("sync", "async")
        )
        assert sync.keys() == background.keys()
        assert all(torch.equal(sync[key], background[key]) for key in sync)


def test_a_failed_write_ends_the_run(ranks: RankPools, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*flags_of(folder, run), "--async-save"]
    outcomes = ranks.run(train_and_end, flags, "full disk", world_size=2)
    for code, error, _ in outcomes:
        assert code == 1
        assert error.startswith("a checkpoint could not be saved in the background: ")
        assert "goes on from the checkpoint before it" in error
        assert "\n" not in error
    assert os.strerror(errno.ENOSPC) in outcomes[0][1]
    assert (run / POINTER).read_text() == "1"
    assert not (run / "iter_0000002" / MANIFEST).exists()
    before = {name: value for name, value in listing(run).items() if "0001" in name}
    assert ranks.run(train, flags, world_size=2)[0][:2] == (0, "")
    after = listing(run)
    assert {name: after[name] for name in before} == before
    assert (run / POINTER).read_text() == str(STEPS)
