"""The router against a loop over tokens, and its buffers: counts, and a bias that stays fp32."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_trinity.moe.router import sigmoid_topk
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

LAYERS, DENSE, EXPERTS, TOPK = 3, 1, 8, 2
LENGTH, BATCH = 12, 2


def reference(
    logits: Tensor, bias: Tensor, topk: int, route_scale: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Token by token in fp64."""
    weights, chosen = np.zeros(logits.shape), np.zeros(logits.shape, dtype=bool)
    for token, row in enumerate(logits.double().numpy()):
        scores = 1 / (1 + np.exp(-row))
        best = np.argsort(-(scores + bias.double().numpy()))[:topk]
        chosen[token, best] = True
        weights[token, best] = route_scale * scores[best] / scores[best].sum()
    return weights, chosen


@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 9),
    data=st.data(),
    route_scale=st.sampled_from([1.0, 2.448, 2.826]),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_sigmoid_topk_is_the_loop_over_tokens(
    tokens: int, experts: int, data: st.DataObject, route_scale: float, spread: float
) -> None:
    topk = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    bias = spread * torch.randn(experts, generator=generator)
    weights, chosen = sigmoid_topk(logits, bias, topk, route_scale)
    expected_weights, expected_choice = reference(logits, bias, topk, route_scale)
    np.testing.assert_array_equal(chosen.numpy(), expected_choice)
    np.testing.assert_allclose(weights.numpy(), expected_weights, rtol=2e-6, atol=0)
    np.testing.assert_allclose(weights.sum(dim=1).numpy(), route_scale, rtol=1e-6)


def test_the_bias_selects_and_never_weighs() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    scores = torch.sigmoid(logits)[0]
    unbiased, _ = sigmoid_topk(logits, torch.zeros(4), 2, 1.0)
    biased, chosen = sigmoid_topk(logits, torch.tensor([-9.0, 0.0, 0.0, 9.0]), 2, 1.0)
    shifted, _ = sigmoid_topk(logits, torch.full((4,), 7.0), 2, 1.0)
    assert chosen.tolist() == [[False, True, False, True]]
    expected = scores[[1, 3]] / scores[[1, 3]].sum()
    torch.testing.assert_close(biased[0, [1, 3]], expected)
    assert torch.equal(shifted, unbiased)


@pytest.mark.parametrize("route_scale", [1.0, 2.448])
def test_the_weight_of_top_1_routing_is_the_route_scale(route_scale: float) -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    weights, chosen = sigmoid_topk(logits, torch.zeros(6), 1, route_scale)
    torch.testing.assert_close(weights[chosen], torch.full((50,), route_scale), rtol=1e-6, atol=0)
    assert torch.equal(chosen.int().argmax(dim=1), logits.argmax(dim=1))


@pytest.mark.parametrize("logit", [100.0, -100.0, -30.0])
def test_saturated_logits_stay_finite(logit: float) -> None:
    logits = torch.full((3, 4), logit, requires_grad=True)
    weights, chosen = sigmoid_topk(logits, torch.zeros(4), 2, 1.5)
    weights.square().sum().backward()
    assert torch.isfinite(weights).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert chosen.sum(dim=1).tolist() == [2, 2, 2]
    if logit > -50:  # below, the scores themselves vanish next to the epsilon
        torch.testing.assert_close(weights.sum(dim=1), torch.full((3,), 1.5), rtol=1e-5, atol=0)


def test_one_saturated_expert_takes_all_the_weight() -> None:
    weights, _ = sigmoid_topk(torch.tensor([[100.0, -100.0, -100.0]]), torch.zeros(3), 2, 2.0)
    assert weights.max().item() == 2.0
    assert torch.isfinite(weights).all()


def test_bf16_logits_are_scored_in_fp32() -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    weights, chosen = sigmoid_topk(logits, torch.zeros(8), 3, 1.0)
    assert weights.dtype == torch.float32
    expected, _ = sigmoid_topk(logits.float(), torch.zeros(8), 3, 1.0)
    assert torch.equal(weights, expected)
    assert chosen.dtype == torch.bool


def test_the_gradient_of_the_logits_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 6, generator=generator).requires_grad_()
    bias, cotangent = torch.randn(6, generator=generator), torch.randn(9, 6, generator=generator)
    weights, chosen = sigmoid_topk(logits, bias, 3, 2.0)
    [got] = torch.autograd.grad(weights, logits, cotangent)
    doubled = logits.detach().double().requires_grad_()
    scores = torch.sigmoid(doubled) * chosen
    formula = 2 * scores / scores.sum(dim=1, keepdim=True)
    [expected] = torch.autograd.grad(formula, doubled, cotangent.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert (got[~chosen] == 0).all()


def model(flags: tuple[str, ...] = ()) -> Any:
    return build(
        parse(
            afmoe_config(
                num_hidden_layers=LAYERS,
                num_dense_layers=DENSE,
                num_experts=EXPERTS,
                num_experts_per_tok=TOPK,
            ),
            flags,
        )
    )


def routers(trinity: Any) -> list[Any]:
    return [layer.mlp.router for layer in trinity.decoder.layers[DENSE:]]


def run_model(trinity: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(160, (BATCH, LENGTH), generator=generator)
    out: Tensor = trinity(ids, torch.arange(LENGTH).expand(BATCH, LENGTH), None)
    return out


def masked_counts(rank: int, world_size: int) -> dict[str, Any]:
    router = routers(model())[0].train()
    logits = torch.randn(LENGTH, BATCH, EXPERTS, generator=torch.Generator().manual_seed(5))
    padding = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
    padding[-4:, 1] = True
    result: dict[str, Any] = {}
    for name, mask in (("all", None), ("padded", padding), ("full", padding & False)):
        router.tokens_per_expert.zero_()
        weights, chosen = router.routing(logits, mask)
        result[name] = (router.tokens_per_expert.clone(), weights.detach(), chosen)
    result["real"] = ~padding.reshape(-1)
    return result


def test_padding_goes_to_the_experts_in_turn_and_is_not_counted(ranks: RankPools) -> None:
    [result] = ranks.run(masked_counts, world_size=1)
    real = result["real"]
    counts, weights, chosen = result["all"]
    assert counts.tolist() == chosen.sum(dim=0).tolist()
    assert counts.sum() == LENGTH * BATCH * TOPK
    padded_counts, padded_weights, padded_choice = result["padded"]
    assert torch.equal(padded_weights[real], weights[real])
    assert torch.equal(padded_choice[real], chosen[real])
    assert padded_counts.tolist() == chosen[real].sum(dim=0).tolist()
    assert padded_counts.sum() == (LENGTH * BATCH - 4) * TOPK
    # Four tokens with two experts each are all eight experts, though every other token is real.
    assert padded_choice[~real].sum(dim=0).tolist() == [1] * EXPERTS
    assert padded_choice[~real].sum(dim=1).tolist() == [TOPK] * 4
    assert torch.equal(padded_weights > 0, padded_choice)
    for full, untold in zip(result["full"], result["all"], strict=True):
        assert torch.equal(full, untold)


def buffers_through_evaluation(rank: int, world_size: int) -> dict[str, Any]:
    trinity = model()
    for router in routers(trinity):
        router.expert_bias.copy_(torch.randn(EXPERTS))
    run_model(trinity)

    def state() -> list[Tensor]:
        return [b.clone() for r in routers(trinity) for b in r.buffers()]

    trained = state()
    with torch.no_grad():
        run_model(trinity)
        run_model(trinity.eval())
    evaluated = state()
    run_model(trinity.train())
    return {
        "equal": [torch.equal(*pair) for pair in zip(trained, evaluated, strict=True)],
        "counts": [r.tokens_per_expert.sum().item() for r in routers(trinity)],
    }


def test_evaluation_leaves_every_buffer_as_it_was(ranks: RankPools) -> None:
    [result] = ranks.run(buffers_through_evaluation, world_size=1)
    assert len(result["equal"]) >= 2 * (LAYERS - DENSE)
    assert all(result["equal"])
    assert result["counts"] == [2 * LENGTH * BATCH * TOPK] * (LAYERS - DENSE)


def bias_in_bf16(rank: int, world_size: int) -> dict[str, Any]:
    trinity = model(("--bf16",))
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(bias, bias.bfloat16().float())
    for router in routers(trinity):
        router.expert_bias.copy_(bias)
    seen = {}

    def note(when: str, of: Any) -> None:
        seen[when] = [
            (r.expert_bias.dtype, torch.equal(r.expert_bias.float(), bias)) for r in routers(of)
        ]

    wrapped = Float16Module(trinity.config, trinity)
    note("wrapped", trinity)
    run_model(wrapped)
    note("forward", trinity)
    file = io.BytesIO()
    torch.save(wrapped.module.state_dict(), file)
    file.seek(0)
    other = model_again(trinity)
    other.module.load_state_dict(torch.load(file, weights_only=False))
    note("loaded", other.module)
    run_model(other)
    note("forward after loading", other.module)
    weight = routers(trinity)[0].weight.dtype
    return {"seen": seen, "weight": weight}


def model_again(trinity: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_trinity.model.builder import TrinityModelBuilder
    from megatron_trinity.model.config import model_config_from_args

    args = parse(
        afmoe_config(num_hidden_layers=LAYERS, num_dense_layers=DENSE, num_experts=EXPERTS),
        ("--bf16",),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    other = TrinityModelBuilder(model_config_from_args(args)).build_model(groups)
    return Float16Module(trinity.config, other)


def test_the_bias_of_a_bf16_model_stays_fp32_bit_by_bit(ranks: RankPools) -> None:
    [result] = ranks.run(bias_in_bf16, world_size=1)
    assert result["weight"] == torch.bfloat16, "the model itself is cast"
    for when, states in result["seen"].items():
        assert states == [(torch.float32, True)] * (LAYERS - DENSE), when


def gating_dtype(rank: int, world_size: int) -> tuple[torch.dtype, bool]:
    trinity = model(("--bf16",))
    Float16Module(trinity.config, trinity)
    router = routers(trinity)[0]
    hidden = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    logits = router.gating(hidden)
    exact = hidden.double() @ router.weight.double().T
    return logits.dtype, bool((logits.double() - exact).abs().max() < 1e-5)


def test_gating_of_a_bf16_model_is_computed_in_fp32(ranks: RankPools) -> None:
    assert ranks.run(gating_dtype, world_size=1) == [(torch.float32, True)]
