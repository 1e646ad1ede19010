"""The state of the router: dtypes and values that no cast touches, exact counts, the update."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from megatron_trinity.moe.balancing import sign_update, smebu_update
from megatron_trinity.moe.router import MOMENTUM, TrinityRouter, balance
from megatron_trinity.planning.costs.operations import OperationCounter
from megatron_trinity.planning.costs.places import Places

EXPERTS = 4
EXACT = torch.tensor([0.1, 1e-3, 257.25, -3.0000002])  # bf16 would round each


def router(load_balancing: str = "smebu") -> TrinityRouter:
    """A router without process groups: only its state is of interest."""
    from megatron_trinity.model.config import TrinityConfig

    config = TrinityConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=8,
        moe_router_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        use_cpu_initialization=True,
        load_balancing=load_balancing,
    )
    groups = types.SimpleNamespace(**dict.fromkeys(("tp", "cp", "tp_cp", "tp_dp_cp"), None))
    return TrinityRouter(config=config, pg_collection=groups)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_leaves_the_state_alone(cast: str) -> None:
    module = router()
    module.expert_bias.copy_(EXACT)
    module.expert_bias_momentum.copy_(-EXACT)
    module.tokens_per_expert.fill_(40_001)
    getattr(module, cast)()
    assert module.weight.dtype == getattr(torch, cast.replace("double", "float64"))
    for name, expected in (("expert_bias", EXACT), (MOMENTUM, -EXACT)):
        state = getattr(module, name)
        assert state.dtype == torch.float32
        assert torch.equal(state, expected)
    assert module.tokens_per_expert.dtype == torch.int64
    assert module.tokens_per_expert.tolist() == [40_001] * EXPERTS


def test_counts_are_right_to_the_token() -> None:
    module = router("sign").bfloat16()
    logits = torch.zeros(40_001, 1, EXPERTS)
    logits[:, :, 0] = 1.0  # expert 0, and one of the others, always the same
    for length in (40_000, 1):
        module.routing(logits[:length])
    with torch.no_grad():  # evaluation, or the first pass of recompute
        module.routing(logits)
    module.eval().routing(logits)
    counts = module.train().take_counts()
    assert counts.dtype == torch.int64
    assert sorted(counts.tolist()) == [0, 0, 40_001, 40_001]
    assert counts[0] == 40_001
    assert module.take_counts().tolist() == [0] * EXPERTS


def test_to_meta_and_back() -> None:
    module = router().to("meta")
    assert module.expert_bias.is_meta
    module.to_empty(device="cpu")
    for state in (module.expert_bias, module.expert_bias_momentum):
        assert state.device.type == "cpu"
        assert state.dtype == torch.float32


def test_balance_is_the_rule_that_was_chosen() -> None:
    counts = torch.tensor([7, 1, 0, 4])
    for rule in ("sign", "smebu", "none"):
        module = router(rule)
        module.expert_bias.copy_(torch.tensor([0.3, -0.1, -0.1, -0.1]))
        before = module.expert_bias.clone()
        for _ in range(2):
            balance([module], counts.unsqueeze(0))
        if rule == "sign":
            expected = sign_update(sign_update(before, counts, 1e-3), counts, 1e-3)
        elif rule == "smebu":
            state = smebu_update(before, torch.zeros(EXPERTS), counts, 2.0, 5e-4, 0.5)
            expected, momentum = smebu_update(*state, counts, 2.0, 5e-4, 0.5)
            assert torch.equal(module.expert_bias_momentum, momentum)
        else:
            expected = before
        assert torch.equal(module.expert_bias, expected)


@pytest.mark.parametrize("rule", ["sign", "smebu"])
def test_layers_that_are_balanced_at_once_are_as_if_alone(rule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    together, alone = ([router(rule) for _ in range(5)] for _ in range(2))
    for _ in range(4):
        counts = torch.randint(100, (5, EXPERTS), generator=generator)
        with OperationCounter(Places("all")) as of_all:
            balance(together, counts)
        with OperationCounter(Places("all")) as of_one:
            balance(alone[:1], counts[:1])
        assert of_all.launches.total() == of_one.launches.total()
        for module, of_layer in zip(alone[1:], counts[1:], strict=True):
            balance([module], of_layer.unsqueeze(0))
    for one, other in zip(together, alone, strict=True):
        assert all(map(torch.equal, one.buffers(), other.buffers()))
        assert one.expert_bias.any()


def test_only_smebu_has_momentum() -> None:
    assert MOMENTUM in router("smebu").state_dict()
    assert MOMENTUM not in router("sign").state_dict()


def test_a_state_without_momentum_starts_it_from_zero() -> None:
    saved: dict[str, Any] = router("sign").state_dict()
    module = router("smebu")
    module.expert_bias_momentum.fill_(1.0)
    module.load_state_dict(saved)
    assert module.expert_bias_momentum.tolist() == [0.0] * EXPERTS
