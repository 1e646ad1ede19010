"""Kill training at random moments, start it again in another layout, and count the tokens.

    python -m tests.stress.exactly_once --kills 100 --packing document-buffer

Every token of two sources is another one. A run reads both about twice, while it is killed and goes
on with other data-parallel ranks, workers, depths of prefetching and micro-batches, and where
.venv-dali is there, with torch's loader and DALI's in turn. In the steps that count in the end, the
last of each number, there has to be what another process makes of their samples, token by token.
With the default packing every token has to have been predicted twice: but for the first of a
source, which follows nothing, and the one that the last sample looks ahead to. Other packings do
not end with their passes; what a pass of theirs has, unit tests count.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed.pool import PORTABLE, Kind, RankError, RankPool
from tests.paths import ROOT
from tests.stress.options import options_parser
from tests.trainer import SEQUENCE, run_trainer, training_flags

TOKENS = 640  # of each source
BATCH = 8
EPOCHS = 2
STEPS = 2 * EPOCHS * TOKENS // (BATCH * SEQUENCE)
TIMEOUT = 300.0  # seconds
SEED = 1234  # Megatron's default
PACKINGS: dict[str, dict[str, int]] = {
    "sequential": {},
    "in-order": {},
    "document-buffer": {"size": 4, "buffers": 3},
    "best-fit": {},
    "greedy": {},
}
"""With their options."""


@dataclass(frozen=True)
class Start:
    """How a run starts, each time in another way."""

    ranks: int
    workers: int
    micro_batch: int
    prefetch: int  # batches that a worker, or DALI, is ahead
    loader: str

    @classmethod
    def drawn(cls, chance: random.Random, loaders: Sequence[str]) -> Start:
        ranks = chance.choice((1, 2))
        of_rank = BATCH // ranks
        return cls(
            ranks,
            chance.choice((0, 1, 2)),
            chance.choice([size for size in (1, 2, 4, 8) if of_rank % size == 0]),
            chance.choice((1, 2, 5)),
            chance.choice(loaders),
        )


def write_data(folder: Path, packing: str = "sequential") -> Path:
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
    packed = {"packing": {"kind": packing, **PACKINGS[packing]}}
    first = {"tokens": 2 * EPOCHS * TOKENS, "blend": {"a": 1, "b": 1}, **packed}
    described = {
        "sources": {name: {"path": str(folder / name)} for name in "ab"},
        "phases": [first, packed],
        "validation": {"a": {"path": str(folder / "a"), "samples": 2}},
    }
    file.write_text(json.dumps(described))
    return file


def run_noting_labels(
    rank: int, world_size: int, flags: Sequence[str], file: Path, prefetch: int = 2
) -> int:
    """Train in this process; append the labels of each training micro-batch to `file`.

    Those that carry no loss are -1.
    """
    import torch
    from megatron.training import get_args

    from megatron_trinity.data import datasets
    from megatron_trinity.training import forward_step

    next_batch = forward_step.next_batch

    def noting(*args: Any) -> dict[str, Any]:
        batch = next_batch(*args)
        if torch.is_grad_enabled():
            labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -1)
            noted = [get_args().curr_iteration + 1, labels.flatten().tolist()]
            with open(f"{file}-{rank}", "a") as stream:
                stream.write(json.dumps(noted) + "\n")
        return batch

    class DeeperLoader(torch.utils.data.DataLoader[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if kwargs.get("num_workers"):
                kwargs["prefetch_factor"] = prefetch
            super().__init__(*args, **kwargs)

    dali = partial(datasets.DaliLoader, prefetch=prefetch)
    with (
        mock.patch.object(forward_step, "next_batch", noting),
        mock.patch.object(torch.utils.data, "DataLoader", DeeperLoader),
        mock.patch.object(datasets, "DaliLoader", dali),
    ):
        return run_trainer(rank, world_size, flags)


def labels_of(file: Path) -> dict[int, list[int]]:
    """Step to the labels of all ranks."""
    steps: dict[int, list[int]] = defaultdict(list)
    for of_rank in file.parent.glob(f"{file.name}-*"):
        for line in of_rank.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the kill fell into the line
                number, labels = json.loads(line)
                steps[number] += labels
    return steps


def exactly_once(
    folder: Path,
    kills: int,
    seed: int,
    say: Callable[[str], None],
    packings: Sequence[str] = ("sequential",),
    kind: Kind = PORTABLE,
    loaders: Sequence[str] = ("single",),
) -> Counter[str]:
    """Kill runs so many times, each packing's in turn, let them end, and count.

    Args:
        kind: of the ranks; they have to have what `loaders` need.
        loaders: of which each start takes one.
    Returns: the kills by packing.

    Raises:
        AssertionError: a token was lost or repeated.
    """
    say(f"seed {seed}")
    chance = random.Random(seed)
    folder.mkdir(exist_ok=True)
    killed: Counter[str] = Counter()
    again = run = 0
    while killed.total() < kills or not run:
        packing = packings[run % len(packings)]
        run += 1
        of_run = folder / f"run {run}"
        of_run.mkdir()
        data = write_data(of_run, packing)
        applied: dict[int, list[int]] = {}
        share = min(kills - killed.total(), STEPS, -(-kills // len(packings)))
        for number in range(share + 1):
            noted = of_run / f"labels {number}"
            wait = chance.uniform(0.0, 1.5) if number < share else None
            start = Start.drawn(chance, loaders)
            ended = _start(of_run, data, packing, noted, start, kind, wait)
            steps = labels_of(noted)
            again += len(set(steps) & set(applied))
            applied |= steps
            # One that ended ahead of its kill was not killed.
            killed[packing] += int(number < share and not ended)
            if ended:
                break
        check(applied, data, packing)
        say(f"{packing}: {killed[packing]} kills, {again} steps of all run again, all tokens there")
    return killed


def check(applied: dict[int, list[int]], data: Path, packing: str) -> None:
    """Compare the steps with their samples, and count.

    Raises:
        AssertionError: a token was lost or repeated.
    """
    assert sorted(applied) == list(range(1, STEPS + 1))
    for (step, labels), expected in zip(sorted(applied.items()), _expected(data), strict=True):
        assert Counter(labels) == Counter(expected), f"{packing}, step {step}"
    if packing in ("sequential", "in-order"):
        check_counts(applied)


def _expected(data: Path) -> Iterator[list[int]]:
    """The labels of each step, as this process makes them."""
    from megatron_trinity.data.description import read_description
    from megatron_trinity.data.plan import Plan
    from megatron_trinity.data.samples import SampleFormat

    described = read_description(data)
    plan = Plan(described, SEQUENCE, SEED)
    layout = SampleFormat(SEQUENCE, 2 * TOKENS, _apart(described.phases[0].packing))
    for step in range(STEPS):
        labels = []
        for number in range(step * BATCH, (step + 1) * BATCH):
            sample = layout.sample(*plan.pieces(number))
            labels += sample["labels"].masked_fill(sample["loss_mask"] == 0, -1).tolist()
        yield labels


def _apart(packing: str) -> bool:
    """Whether documents are kept apart, as those have to be that are not whole passes."""
    return packing not in ("sequential", "in-order")


def check_counts(applied: dict[int, list[int]]) -> None:
    """Compare what was predicted with what the two sources have, token by token.

    Raises:
        AssertionError: a token was lost or repeated.
    """
    assert {len(labels) for labels in applied.values()} == {BATCH * SEQUENCE}
    counts = Counter(label for labels in applied.values() for label in labels)
    for tokens in (range(TOKENS), range(TOKENS, 2 * TOKENS)):
        off = Counter(counts[token] - EPOCHS for token in tokens if counts[token] != EPOCHS)
        assert off in (Counter(), Counter({-1: 1, 1: 1})), f"lost or repeated: {off}"


def _start(
    run: Path,
    data: Path,
    packing: str,
    noted: Path,
    start: Start,
    kind: Kind,
    wait: float | None = None,
) -> bool:
    """Train, to the end or until `wait` seconds after the first step; returns if it has ended."""
    flags = training_flags(
        run,
        *("--data", str(data), "--vocab-size", str(2 * TOKENS)),
        *("--save", str(run / "saved"), "--load", str(run / "saved"), "--save-interval", "1"),
        *("--optimizer", "adam", "--train-iters", str(STEPS), "--keep-last-checkpoints", "2"),
        *("--global-batch-size", str(BATCH), "--micro-batch-size", str(start.micro_batch)),
        *("--num-workers", str(start.workers), "--dataloader-type", start.loader),
        *(["--dataloader-inter-document-masking"] if _apart(packing) else []),
    )
    for path in ("--train-data-path", "--valid-data-path"):
        del flags[flags.index(path) : flags.index(path) + 2]
    pool = RankPool(start.ranks, kind)
    try:
        with ThreadPoolExecutor(1) as executor:
            arguments = (flags, noted, start.prefetch)
            future = executor.submit(pool.run, run_noting_labels, arguments, TIMEOUT)
            if wait is None:
                assert future.result() == [0] * start.ranks
                return True
            while not future.done() and not labels_of(noted):
                time.sleep(0.01)
            time.sleep(wait)
            ended = future.done()
            for pid in pool.pids:
                if pid is not None:
                    os.killpg(pid, signal.SIGKILL)
            with contextlib.nullcontext() if ended else contextlib.suppress(RankError):
                assert future.result() == [0] * start.ranks
            return ended
    finally:
        pool.close()


def main() -> None:
    from tests.dali.kind import dali_kind

    parser = options_parser(__doc__)
    parser.add_argument("--packing", choices=PACKINGS, action="append", help="default: all")
    options = parser.parse_args()
    python = ROOT / ".venv-dali/bin/python"
    kind, loaders = PORTABLE, ["single"]
    if python.exists():
        kind, loaders = dali_kind(python), ["single", "dali"]
    with tempfile.TemporaryDirectory() as folder:
        killed = exactly_once(
            Path(folder),
            options.kills,
            options.seed,
            print,
            options.packing or list(PACKINGS),
            kind,
            loaders,
        )
    print(f"{killed.total()} kills: {dict(killed)}, loaders {', '.join(loaders)}")


if __name__ == "__main__":
    main()
