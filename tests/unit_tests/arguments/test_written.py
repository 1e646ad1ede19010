"""A run's arguments, written as a preset and read again, are the same arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.pool import RankPools

RUNS = {
    "tiny": "--preset tiny --train-iters 7",
    "large": "--preset large --train-iters 9000 --mock-data --pipeline-model-parallel-size 2 "
    "--pipeline-model-parallel-layout Et*30|t*30L --tokenizer-type NullTokenizer",
    "flags of every form": "--preset nano --no-mup-enabled --train-data-path 0.3 a 0.7 b --bf16 "
    "--attention-backend unfused --exit-signal SIGUSR2 --split 9,1,0 --train-samples 800 "
    "--seq-aux-loss-coeff 1e-5 --no-check-for-nan-in-loss-and-grad --profile-ranks 0 1",
}


def both(rank: int, world_size: int, argv: list[str], path: str) -> tuple[dict[str, Any], ...]:
    from megatron_trinity.arguments.parse import _parse, written_arguments

    blocks = written_arguments(argv)
    Path(path).write_text(yaml.safe_dump(blocks))
    return blocks, vars(_parse(argv)[0]), vars(_parse(["--preset", path])[0])


@pytest.mark.parametrize("run", RUNS)
def test_a_written_run_is_read_as_it_was(ranks: RankPools, tmp_path: Path, run: str) -> None:
    path = str(tmp_path / "arguments.yaml")
    [(blocks, told, read)] = ranks.run(both, RUNS[run].split(), path, world_size=1)
    assert len(blocks["megatron"]) > 250
    assert len(blocks["trinity"]) > 15
    differing = {name for name in told if told[name] != read[name]}
    assert differing == {"preset"}
