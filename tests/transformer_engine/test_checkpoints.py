"""A checkpoint does not say which backend wrote it: either loads the other's, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.pool import RankPools
from tests.distributed.test_muon import LAYOUTS as MUON
from tests.distributed.test_optimizer_resume import ADAM, moved
from tests.trainer import checkpoint_contents, run_trainer, training_flags, write_dataset
from tests.transformer_engine.models import TE

ADAMS = [
    ("one rank", "one rank"),
    ("bf16, DP 2 sharded", "bf16, DP 2 sharded"),
    ("DP 2 sharded", "TP 2, EP 2, DP 2 sharded"),
    ("TP 2, EP 2, DP 2 sharded", "bf16, PP 2"),
]
MUONS = [
    ("one rank", "one rank"),
    ("DP 3 sharded", "TP 2, PP 2, EP 2, DP 2 sharded"),
    ("TP 2, PP 2, EP 2, DP 2 sharded", "EP 2"),
]
CASES = [*(("adam", *case) for case in ADAMS), *(("muon", *case) for case in MUONS)]
BOTH_WAYS = pytest.mark.parametrize("from_te", [False, True], ids=["to TE", "from TE"])


@BOTH_WAYS
@pytest.mark.parametrize(("maker", "source", "target"), CASES)
def test_state_of_an_optimizer_moves(
    ranks: RankPools,
    te_ranks: RankPools,
    tmp_path: Path,
    maker: str,
    source: str,
    target: str,
    from_te: bool,
) -> None:
    layouts = MUON if maker == "muon" else ADAM
    (size, flags), (other_size, others) = layouts[source], layouts[target]
    first, second = (te_ranks, ranks) if from_te else (ranks, te_ranks)
    (saved, again), (went_on, resumed) = moved(
        first,
        tmp_path,
        (size, (*flags, *(TE if from_te else ()))),
        (other_size, (*others, *(() if from_te else TE))),
        maker,
        second,
    )
    assert saved.keys() == again.keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor, again[key]), key
        assert tensor.abs().max() > 0, key
    tolerance = 2**-7 if "bf16" in source + target else 1e-6
    for name, tensor in went_on.items():
        assert (resumed[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def train(
    ranks: RankPools, folder: Path, steps: int, *flags: str, world_size: int = 1, load: str = ""
) -> dict[str, torch.Tensor]:
    """Train to the step `steps`; returns what the checkpoint of it holds."""
    folder.mkdir(exist_ok=True)
    if not (folder / "data.bin").exists():
        write_dataset(folder / "data")
    argv = training_flags(
        folder / "data",
        *(
            "--train-iters",
            "4",
            "--exit-interval",
            str(steps),
            "--save",
            str(folder / "run"),
            "--save-interval",
            "2",
        ),
        *("--adam-eps", "1e-4", "--eval-iters", "0"),
        *(("--load", load) if load else ()),
        *flags,
    )
    assert ranks.run(run_trainer, argv, world_size=world_size) == [0] * world_size
    return checkpoint_contents(folder / "run", steps)


@BOTH_WAYS
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_goes_on_with_the_other_backend(
    ranks: RankPools, te_ranks: RankPools, tmp_path: Path, optimizer: str, from_te: bool
) -> None:
    """Two steps with one and two with the other are four with either; on other ranks as well."""
    flags = ("--optimizer", optimizer)
    first, second = (te_ranks, ranks) if from_te else (ranks, te_ranks)
    of_first, of_second = (TE, ()) if from_te else ((), TE)
    expected = train(ranks, tmp_path / "whole", 4, *flags)
    train(first, tmp_path / "moved", 2, *flags, *of_first)
    sharded = (*flags, *of_second, "--use-distributed-optimizer")
    load = str(tmp_path / "moved/run")
    got = train(second, tmp_path / "moved", 4, *sharded, world_size=2, load=load)
    names = {name for name in expected if not name.startswith("rng_state")}
    assert names == {name for name in got if not name.startswith("rng_state")}
    for name in names:
        error = (got[name] - expected[name]).float().norm()
        assert error <= 4e-5 * expected[name].float().norm() + 1e-7, name
