"""A checkpoint does not say which backend wrote it: either loads the other's, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_trinity.checkpoint.hf.export_hf import export_hf
from megatron_trinity.checkpoint.inspect import inspect_checkpoint
from tests.distributed.pool import RankError, RankPools
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
ADAM_FLAGS = ("--optimizer", "adam")
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
    write_and_train(ranks, folder, steps, *flags, world_size=world_size, load=load)
    return checkpoint_contents(folder / "run", steps)


def write_and_train(
    ranks: RankPools, folder: Path, steps: int, *flags: str, world_size: int = 1, load: str = ""
) -> None:
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


@BOTH_WAYS
def test_a_file_a_rank_is_of_one_backend(
    ranks: RankPools, te_ranks: RankPools, tmp_path: Path, from_te: bool
) -> None:
    """Experts have other names there; what wrote it goes on, and `torch_dist` leads out."""
    flags = ("--ckpt-format", "torch", "--no-load-rng", *ADAM_FLAGS)
    first, second = (te_ranks, ranks) if from_te else (ranks, te_ranks)
    of_first, of_second = (TE, ()) if from_te else ((), TE)
    run, load = tmp_path / "run", str(tmp_path / "run/run")
    write_and_train(first, run, 2, *flags, *of_first)
    with pytest.raises(RankError) as refused:
        write_and_train(second, run, 4, *flags, *of_second, load=load)
    [message] = refused.value.failures.values()
    assert "has a file for each rank with the names that tensors have with" in message
    assert "--transformer-impl transformer_engine --moe-grouped-gemm" in message
    converted = ("--auto-detect-ckpt-format", "--no-load-rng", *ADAM_FLAGS, *of_first)
    write_and_train(first, run, 4, *converted, load=load)
    write_and_train(second, run, 4, *ADAM_FLAGS, *of_second, load=load)


def test_one_file_for_all_from_a_run_with_transformer_engine(
    ranks: RankPools, te_ranks: RankPools, tmp_path: Path
) -> None:
    """`tools/reshard.py --format torch` writes the portable names, and says so in the arguments."""
    train(te_ranks, tmp_path / "te", 2, *ADAM_FLAGS, *TE)
    ranks.run(rewrite, tmp_path / "te/run", tmp_path / "torch/run", world_size=1)
    flags = ("--ckpt-format", "torch", "--no-load-rng", *ADAM_FLAGS)
    write_and_train(ranks, tmp_path / "torch", 4, *flags, load=str(tmp_path / "torch/run"))


def rewrite(rank: int, world_size: int, load: Path, save: Path) -> None:
    import torch.distributed as dist

    from megatron_trinity.checkpoint.reshard import reshard

    dist.destroy_process_group()
    reshard(load, save, ckpt_format="torch")


def test_an_export_is_that_of_a_portable_run(
    ranks: RankPools, te_ranks: RankPools, tmp_path: Path
) -> None:
    """Without a learning rate the weights stay the initial ones, which no backend changes."""
    still = ("--lr", "0", "--adamw-lr", "0", "--weight-decay", "0", "--load-balancing", "none")
    files = []
    for name, pools, flags in (("portable", ranks, ()), ("te", te_ranks, TE)):
        train(pools, tmp_path / name, 2, *ADAM_FLAGS, *still, "--bf16", *flags)
        export_hf(tmp_path / name / "run", tmp_path / name / "hf")
        files.append({path.name: path.read_bytes() for path in (tmp_path / name / "hf").iterdir()})
    assert files[0] == files[1]
    assert "model.safetensors" in files[0]


def test_inspect_sees_the_same(ranks: RankPools, te_ranks: RankPools, tmp_path: Path) -> None:
    found = []
    for name, pools, flags in (("portable", ranks, ()), ("te", te_ranks, TE)):
        train(pools, tmp_path / name, 2, *ADAM_FLAGS, *flags)
        found.append(inspect_checkpoint(tmp_path / name / "run", checksums=True))
    portable, te = found
    assert portable.faults == te.faults == []
    assert te.parameters == portable.parameters
    assert te.tensor_bytes == portable.tensor_bytes
    assert "decoder.layers.0.self_attention.linear_qkv._extra_state" in te.extra_states
    assert te.extra_states == portable.extra_states
