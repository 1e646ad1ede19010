"""Expert balance over ranks: counts, updates and losses do not depend on the layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.crosses import slow
from tests.distributed.pool import RankPools
from tests.trainer import (
    FULL_RECOMPUTE,
    SEQUENCE,
    checkpoint_contents,
    logged,
    run_trainer,
    training_flags,
    write_dataset,
)
from tests.trinity import afmoe_config, build, parse

TP, EP = "--tensor-model-parallel-size", "--expert-model-parallel-size"
SP, ETP = "--sequence-parallel", "--expert-tensor-parallel-size"
PP = "--pipeline-model-parallel-size"
FOUR_RANKS = (TP, "2", SP, EP, "2", ETP, "1")
BATCH, TOPK, MOE_LAYERS = 8, 2, 3
STEPS = 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data")
    return tmp_path / "data"


def train(
    ranks: RankPools, data: Path, run: Path, *flags: str, world_size: int = 1, steps: int = 4
) -> dict[str, Tensor]:
    """Train and return the biases and momenta that the checkpoint holds, by name."""
    argv = training_flags(
        data,
        *("--train-iters", str(steps), "--save", str(run), "--save-interval", str(steps)),
        *("--optimizer", "adam", "--tensorboard-dir", str(run / "log")),
        *flags,
    )
    assert ranks.run(run_trainer, argv, world_size=world_size) == [0] * world_size
    contents = checkpoint_contents(run, steps)
    return {key: value for key, value in contents.items() if "expert_bias" in key}


# The same routing fed to every layout ------------------------------------------------------------


def fed(
    rank: int, world_size: int, flags: Sequence[str], rule: str
) -> tuple[dict[int, Tensor], list[list[int]]]:
    """20 steps in which the routers get the logits of one global batch, cut for the layout."""
    from megatron.core import parallel_state

    from megatron_trinity.training.balance import balance_experts, moe_layers, routers

    args = parse(
        afmoe_config(num_hidden_layers=4),
        ["--load-balancing", rule, *flags],
    )
    model = build(args)
    data_ranks = parallel_state.get_data_parallel_world_size()
    data_rank = parallel_state.get_data_parallel_rank()
    tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    counts = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for router in routers([model]):
            logits = torch.randn(SEQUENCE, BATCH, 8, generator=generator)
            logits = logits + torch.linspace(-1, 1, 8)
            part = logits.chunk(tensor_ranks)[tensor_rank].chunk(data_ranks, dim=1)[data_rank]
            for micro_batch in part.chunk(2, dim=1):
                router.routing(micro_batch.contiguous())
        balance = balance_experts([model], moe_layers(args), args.num_experts, applied=True)
        assert balance.layers == (2, 3, 4)
        counts.append(balance.counts.sum(dim=1).tolist())
    return {r.layer_number: r.expert_bias.clone() for r in routers([model])}, counts


@pytest.mark.parametrize("rule", ["sign", "smebu"])
def test_the_same_routing_gives_the_same_bias_bit_by_bit(ranks: RankPools, rule: str) -> None:
    [(single, counts)] = ranks.run(fed, (), rule, world_size=1)
    assert counts == [[SEQUENCE * BATCH * TOPK] * MOE_LAYERS] * STEPS
    for bias, four_counts in ranks.run(fed, FOUR_RANKS, rule, world_size=4):
        assert four_counts == counts
        assert all(torch.equal(bias[layer], single[layer]) for layer in single)
    assert all(bias.abs().max() > 0 for bias in single.values())


# The real trainer --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [slow("smebu"), slow("sign")])
def test_training_over_four_ranks(ranks: RankPools, data: Path, tmp_path: Path, rule: str) -> None:
    rate = "--smebu-lambda" if rule == "smebu" else "--moe-router-bias-update-rate"
    flags = ("--load-balancing", rule, "--lr", "1e-4", rate, "0.01")
    single = train(ranks, data, tmp_path / "one", *flags, steps=STEPS)
    four = train(ranks, data, tmp_path / "four", *flags, *FOUR_RANKS, world_size=4, steps=STEPS)
    assert single.keys() == four.keys()
    assert len(single) == MOE_LAYERS * (2 if rule == "smebu" else 1)
    for key, value in single.items():
        assert value.dtype == torch.float32
        assert value.abs().max() > 0
        torch.testing.assert_close(four[key], value, rtol=0, atol=1e-6)


ALIKE = {
    "micro-batches of 1": ("--micro-batch-size", "1"),
    "micro-batches of 8": ("--micro-batch-size", "8"),
    "full recompute": FULL_RECOMPUTE,
    "recompute of experts": ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    "recompute of attention": (
        *("--recompute-granularity", "selective", "--recompute-modules", "core_attn"),
    ),
}


def test_counts_and_losses_do_not_depend_on_micro_batches_or_recompute(
    ranks: RankPools, data: Path, tmp_path: Path
) -> None:
    flags = ("--seq-aux-loss-coeff", "0.05", "--load-balancing", "sign")
    reference = train(ranks, data, tmp_path / "reference", *flags)
    tags = ("lm loss", "sequence loss", "load entropy", "max violation", "grad-norm")
    values = {tag: logged(tmp_path / "reference" / "log", tag) for tag in tags}
    assert all(0 < value < 1 for value in values["sequence loss"].values())
    for name, changes in ALIKE.items():
        run = tmp_path / name.replace(" ", "-")
        biases = train(ranks, data, run, *flags, *changes)
        assert all(torch.equal(biases[key], reference[key]) for key in reference), name
        for tag in tags:
            assert logged(run / "log", tag) == pytest.approx(values[tag], rel=2e-6), (name, tag)


@pytest.mark.slow
def test_the_sequence_loss_does_not_depend_on_the_layout(
    ranks: RankPools, data: Path, tmp_path: Path
) -> None:
    flags = ("--seq-aux-loss-coeff", "0.05", "--load-balancing", "none")
    train(ranks, data, tmp_path / "one", *flags)
    tags = ("lm loss", "sequence loss", "grad-norm")
    values = {tag: logged(tmp_path / "one" / "log", tag) for tag in tags}
    for name, world_size, layout in (
        ("data", 2, ()),
        ("four", 4, FOUR_RANKS),
        ("pipeline", 2, (PP, "2")),
    ):
        train(ranks, data, tmp_path / name, *flags, *layout, world_size=world_size)
        for tag in tags:
            got = logged(tmp_path / name / "log", tag)
            assert got == pytest.approx(values[tag], rel=1e-4), (name, tag)
        # One step is from the same weights: no room for the optimizer to magnify rounding.
        assert logged(tmp_path / name / "log", "grad-norm")[1] == pytest.approx(
            values["grad-norm"][1], rel=2e-6
        )


@pytest.mark.slow
def test_none_leaves_the_bias_where_it_is(ranks: RankPools, data: Path, tmp_path: Path) -> None:
    biases = train(ranks, data, tmp_path / "run", "--load-balancing", "none")
    assert len(biases) == MOE_LAYERS
    assert all(bias.abs().max() == 0 for bias in biases.values())
    assert all(value > 0 for value in logged(tmp_path / "run" / "log", "max violation").values())


def test_evaluation_between_steps_changes_nothing(
    ranks: RankPools, data: Path, tmp_path: Path
) -> None:
    without = train(ranks, data, tmp_path / "without", "--load-balancing", "smebu")
    between = train(
        ranks, data, tmp_path / "with", "--load-balancing", "smebu", "--eval-interval", "1"
    )
    assert all(torch.equal(between[key], without[key]) for key in without)


def skipped(rank: int, world_size: int) -> dict[str, Any]:
    """A step that is skipped: its tokens are forgotten, bias and momentum stay."""
    from megatron_trinity.training.balance import balance_experts, moe_layers, routers

    args = parse(afmoe_config(num_hidden_layers=4), ["--load-balancing", "smebu"])
    model = build(args)
    states = []
    for applied in (True, False, True):
        for router in routers([model]):
            router.routing(torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(1)))
        balance_experts([model], moe_layers(args), args.num_experts, applied)
        states.append(
            [
                (
                    r.expert_bias.clone(),
                    r.expert_bias_momentum.clone(),
                    int(r.tokens_per_expert.sum()),
                )
                for r in routers([model])
            ]
        )
    return {"states": states}


def test_a_skipped_step_is_forgotten(ranks: RankPools) -> None:
    [result] = ranks.run(skipped, world_size=1)
    first, second, third = result["states"]
    for before, after, later in zip(first, second, third, strict=True):
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
        assert not torch.equal(after[0], later[0])
        assert (before[2], after[2], later[2]) == (0, 0, 0)


@pytest.mark.slow
def test_momentum_is_saved_and_starts_from_zero_where_there_is_none(
    ranks: RankPools, data: Path, tmp_path: Path
) -> None:
    flags = ("--load", str(tmp_path / "run"), "--lr-decay-iters", "9")
    smebu = (*flags, "--load-balancing", "smebu")
    sign = train(ranks, data, tmp_path / "run", *flags, "--load-balancing", "sign", steps=2)
    assert not any("momentum" in key for key in sign)
    resumed = train(
        ranks, data, tmp_path / "run", *smebu, "--override-opt-param-scheduler", steps=3
    )
    momenta = {key: value for key, value in resumed.items() if "momentum" in key}
    assert len(momenta) == MOE_LAYERS
    for key, momentum in momenta.items():
        # One step from zero: what the bias has moved by is the momentum.
        bias = key.removesuffix("_momentum")
        torch.testing.assert_close(resumed[bias] - sign[bias], momentum, rtol=0, atol=1e-8)
    on = train(ranks, data, tmp_path / "run", *smebu, "--override-opt-param-scheduler", steps=4)
    assert all(not torch.equal(on[key], momenta[key]) for key in momenta)
