"""What the real trainer reads: by description, by name, and the same after a stop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.distributed.pool import RankError, RankPools
from tests.stress.exactly_once import (
    BATCH,
    PACKINGS,
    TOKENS,
    exactly_once,
    labels_of,
    run_noting_labels,
)
from tests.stress.exactly_once import write_data as write_described
from tests.trainer import SEQUENCE, logged, run_trainer, training_flags

pytestmark = pytest.mark.distributed


@pytest.fixture
def described(tmp_path: Path) -> Path:
    return write_described(tmp_path)


def flags_of(data: Path, *flags: str) -> list[str]:
    words = training_flags(data, "--data", str(data), "--vocab-size", str(2 * TOKENS), *flags)
    for path in ("--train-data-path", "--valid-data-path"):
        del words[words.index(path) : words.index(path) + 2]
    return words


@pytest.mark.slow
def test_neither_length_nor_layout_changes_what_is_read(
    ranks: RankPools, described: Path, tmp_path: Path
) -> None:
    """A run across the end of a phase and of epochs, against one of another length and batch."""
    one = flags_of(described, "--train-iters", "12", "--global-batch-size", "8")
    two = flags_of(
        described,
        *("--train-iters", "5", "--global-batch-size", "16", "--micro-batch-size", "4"),
        *("--num-workers", "1", "--eval-iters", "0"),
    )
    log = str(tmp_path / "log")
    ranks.run(run_noting_labels, [*one, "--tensorboard-dir", log], tmp_path / "one", world_size=1)
    ranks.run(run_noting_labels, two, tmp_path / "two", world_size=2)
    first, other = labels_of(tmp_path / "one"), labels_of(tmp_path / "two")
    assert len(first) == 12
    for step in range(1, 6):
        both = first[2 * step - 1] + first[2 * step]
        assert sorted(other[step]) == sorted(both), step
    # What was read is told by source, and validation by name.
    tokens = {name: logged(tmp_path / "log", f"data tokens {name}") for name in "ab"}
    for step in range(1, 13):
        of_a = sum(label < TOKENS for n in range(1, step + 1) for label in first[n])
        assert abs(tokens["a"][step] - of_a) <= 2 * SEQUENCE
        assert tokens["a"][step] + tokens["b"][step] == step * BATCH * SEQUENCE
    [loss] = logged(tmp_path / "log", "lm loss validation-a").values()
    [perplexity] = logged(tmp_path / "log", "perplexity validation-a").values()
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_changed_data_are_refused_on_resume(
    ranks: RankPools, described: Path, tmp_path: Path
) -> None:
    warm = ("--lr-warmup-iters", "0", "--override-opt-param-scheduler")
    run = ("--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    flags = flags_of(
        described, "--optimizer", "adam", "--save-interval", "1", "--eval-iters", "0", *warm, *run
    )
    ranks.run(run_trainer, [*flags, "--train-iters", "1"], world_size=1)
    content = json.loads(described.read_text())
    content["phases"][0]["blend"] = {"a": 3, "b": 1}
    described.write_text(json.dumps(content))
    with pytest.raises(RankError, match="is of a run that reads other data: phase 1 has another b"):
        ranks.run(run_trainer, [*flags, "--train-iters", "2"], world_size=1)
    accepted = [*flags, "--train-iters", "2", "--accept-changed-data"]
    assert ranks.run(run_trainer, accepted, world_size=1) == [0]


@pytest.mark.slow
def test_kills_lose_and_repeat_no_token(tmp_path: Path) -> None:
    """A kill of each packing, between starts of other ranks, workers and depths of prefetching."""
    killed = exactly_once(tmp_path / "kills", len(PACKINGS), 11, print, list(PACKINGS))
    assert killed == dict.fromkeys(PACKINGS, 1)
