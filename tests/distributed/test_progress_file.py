"""What `--log-progress` writes is right over a resume, and half a line in it is refused at once."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_trinity.planning.flops import pairs_of_layers, training_flops
from megatron_trinity.planning.sizes import ModelSizes
from megatron_trinity.training.progress_file import is_whole
from tests.broken_runs import flags_of, train
from tests.distributed.pool import RankPools
from tests.trainer import SEQUENCE, write_dataset

GPUS = "2026-01-01 00:00:00\tJob ID: \t# GPUs: 2\t"
SAVED = (
    f"{GPUS}Saved checkpoint\tIteration: 2\tJob throughput: 0.0 TFLOP/s/GPU\t"
    "Cumulative throughput: 0.0 TFLOP/s/GPU\tFloating-point operations: 1.98e+11\t"
    "Tokens (in billions): 0.00"
)


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        (f"{GPUS}Starting job", True),
        (SAVED, True),
        (SAVED.replace("Saved checkpoint", "Saving async checkpoint"), True),
        (f"{GPUS}Saved async checkpoint\tIteration: 6", True),
        (GPUS.strip(), False),
        (f"{GPUS}Saved checkpoint\tIteration: 2", False),
        (SAVED.replace("1.98e+11", "1.98e"), False),
        ("2026-01-01 00:0", False),
        (SAVED.replace("# GPUs: 2", "# GPUs:"), False),
        ("", False),
    ],
)
def test_lines_that_megatron_reads(line: str, whole: bool) -> None:
    assert is_whole(line) == whole


def flops_of_a_step(rank: int, world_size: int, flags: Sequence[str]) -> float:
    from megatron_trinity.arguments.parse import parse_arguments

    args: Namespace = parse_arguments(flags)
    args.vocab_size = args.padded_vocab_size = 160
    sizes, batch = ModelSizes.from_args(args), args.global_batch_size
    pairs = pairs_of_layers(sizes, [SEQUENCE])
    return float(training_flops(sizes, batch * SEQUENCE, *(batch * number for number in pairs)))


@pytest.mark.slow
def test_figures_go_on_over_a_resume(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    run = flags_of(tmp_path, tmp_path / "run", "--log-progress")
    assert ranks.run(train, [*run, "--exit-interval", "2"], world_size=1)[0][0] == 0
    assert ranks.run(train, run, world_size=1)[0][0] == 0
    file = tmp_path / "run" / "progress.txt"
    lines = file.read_text().splitlines()
    assert all(map(is_whole, lines))
    assert sum("Starting job" in line for line in lines) == 2
    [step] = ranks.run(flops_of_a_step, run, world_size=1)
    told = [
        line.split("Floating-point operations: ")[1].split()[0] for line in lines if "FL" in line
    ]
    assert told == [f"{number * step:.2e}" for number in (1, 2, 3, 4)]
    with file.open("a") as stream:
        stream.write(GPUS)
    code, error, _ = ranks.run(train, run, world_size=1)[0]
    assert (code, error) == (
        2,
        f"--log-progress goes on in {file}, whose line 7 is not whole; take the line out, or leave "
        "--log-progress out",
    )
