"""Kill training at random moments, start it again in another layout, and count the tokens.

    python -m tests.stress.exactly_once --kills 100

Every token of two sources is another one. A run reads both twice, while it is killed and goes on
with other data-parallel ranks, workers and micro-batches. In the steps that count in the end, the
last of each number, every token has to have been predicted twice: but for the first of a source,
which follows nothing, and the one that the last sample looks ahead to.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.distributed.pool import RankError, RankPool
from tests.stress.options import parse_options
from tests.trainer import SEQUENCE, run_trainer, training_flags

TOKENS = 640  # of each source
BATCH = 8
EPOCHS = 2
STEPS = 2 * EPOCHS * TOKENS // (BATCH * SEQUENCE)
TIMEOUT = 300.0  # seconds
LAYOUTS = [(1, 0, 8), (2, 1, 2), (1, 2, 1), (2, 0, 4), (1, 1, 4), (2, 2, 1)]
"""Ranks, workers, and samples of a micro-batch."""


def write_data(folder: Path) -> Path:
    """Two sources whose tokens are numbered through, and a file that describes them."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    generator = random.Random(1)
    for number, name in enumerate("ab"):
        prefix = folder / name
        builder = IndexedDatasetBuilder(
            f"{prefix}.bin", dtype=DType.optimal_dtype(2 * TOKENS), multimodal=False
        )
        begin, end = number * TOKENS, (number + 1) * TOKENS
        while begin < end:
            length = min(generator.randint(1, 70), end - begin)
            builder.add_document(torch.arange(begin, begin + length), [length])
            begin += length
        builder.finalize(f"{prefix}.idx")
    file = folder / "data.yaml"
    described = {
        "sources": {name: {"path": str(folder / name)} for name in "ab"},
        "phases": [{"tokens": 2 * EPOCHS * TOKENS, "blend": {"a": 1, "b": 1}}, {}],
        "validation": {"a": {"path": str(folder / "a"), "samples": 2}},
    }
    file.write_text(json.dumps(described))
    return file


def run_noting_labels(rank: int, world_size: int, flags: Sequence[str], file: Path) -> int:
    """Train in this process; append the labels of each training micro-batch to `file`."""
    import torch
    from megatron.training import get_args

    from megatron_trinity.training import forward_step

    next_batch = forward_step.next_batch

    def noting(*args: Any) -> dict[str, Any]:
        batch = next_batch(*args)
        if torch.is_grad_enabled():
            noted = [get_args().curr_iteration + 1, batch["labels"].flatten().tolist()]
            with open(f"{file}-{rank}", "a") as stream:
                stream.write(json.dumps(noted) + "\n")
        return batch

    setattr(forward_step, "next_batch", noting)
    try:
        return run_trainer(rank, world_size, flags)
    finally:
        setattr(forward_step, "next_batch", next_batch)


def labels_of(file: Path) -> dict[int, list[int]]:
    """Step to the labels of all ranks."""
    steps: dict[int, list[int]] = defaultdict(list)
    for of_rank in file.parent.glob(f"{file.name}-*"):
        for line in of_rank.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the kill fell into the line
                number, labels = json.loads(line)
                steps[number] += labels
    return steps


def exactly_once(folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> int:
    """Kill a run so many times, let it end, and count; returns how many steps were run again.

    Raises:
        AssertionError: a token was lost or repeated.
    """
    say(f"seed {seed}")
    chance = random.Random(seed)
    folder.mkdir(exist_ok=True)
    data = write_data(folder)
    again = killed = run = 0
    while killed < kills or not run:
        run += 1
        applied: dict[int, list[int]] = {}
        share = min(kills - killed, STEPS)
        for number in range(share + 1):
            layout = chance.choice(LAYOUTS) if number else LAYOUTS[run % len(LAYOUTS)]
            noted = folder / f"labels {run} {number}"
            wait = chance.uniform(0.0, 1.5) if number < share else None
            ended = _start(folder / f"run {run}", data, noted, layout, wait)
            steps = labels_of(noted)
            again += len(set(steps) & set(applied))
            applied |= steps
            killed += int(number < share)
            if ended:
                break
        if not ended:
            _start(folder / f"run {run}", data, noted := folder / f"labels {run} end", (1, 0, 8))
            applied |= labels_of(noted)
        check_counts(applied)
        say(f"{killed} kills, {again} steps run again, every token as often as it should be")
    return again


def check_counts(applied: dict[int, list[int]]) -> None:
    """Compare what was predicted with what the two sources have, token by token.

    Raises:
        AssertionError: a token was lost or repeated.
    """
    assert sorted(applied) == list(range(1, STEPS + 1))
    assert {len(labels) for labels in applied.values()} == {BATCH * SEQUENCE}
    counts = Counter(label for labels in applied.values() for label in labels)
    for tokens in (range(TOKENS), range(TOKENS, 2 * TOKENS)):
        off = Counter(counts[token] - EPOCHS for token in tokens if counts[token] != EPOCHS)
        assert off in (Counter(), Counter({-1: 1, 1: 1})), f"lost or repeated: {off}"


def _start(
    run: Path, data: Path, noted: Path, layout: tuple[int, int, int], wait: float | None = None
) -> bool:
    """Train, to the end or until `wait` seconds after the first step; returns if it has ended."""
    world_size, workers, micro_batch = layout
    flags = training_flags(
        run,
        *("--data", str(data), "--vocab-size", str(2 * TOKENS)),
        *("--save", str(run), "--load", str(run), "--save-interval", "1"),
        *("--optimizer", "adam", "--train-iters", str(STEPS), "--keep-last-checkpoints", "2"),
        *("--global-batch-size", str(BATCH), "--micro-batch-size", str(micro_batch)),
        *("--num-workers", str(workers)),
    )
    for path in ("--train-data-path", "--valid-data-path"):
        del flags[flags.index(path) : flags.index(path) + 2]
    pool = RankPool(world_size)
    try:
        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(pool.run, run_noting_labels, (flags, noted), TIMEOUT)
            if wait is None:
                assert future.result() == [0] * world_size
                return True
            while not future.done() and not labels_of(noted):
                time.sleep(0.01)
            time.sleep(wait)
            ended = future.done()
            for pid in pool.pids:
                if pid is not None:
                    os.killpg(pid, signal.SIGKILL)
            with contextlib.nullcontext() if ended else contextlib.suppress(RankError):
                assert future.result() == [0] * world_size
            return ended
    finally:
        pool.close()


def main() -> None:
    options = parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        exactly_once(Path(folder), options.kills, options.seed, print)


if __name__ == "__main__":
    main()
