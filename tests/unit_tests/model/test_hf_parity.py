"""The model computes what transformers' AfmoeForCausalLM computes: logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AfmoeConfig, AfmoeForCausalLM

from megatron_trinity.checkpoint.hf.mapping import to_hf
from megatron_trinity.model.architecture import initializer_sigma
from tests.afmoe import to_trinity
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse

# Name, sequence length, what differs from `afmoe_config()`. Lengths are no powers of two.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "window shorter than the sequence": (37, {}),
    "window as long as the sequence": (19, {"sliding_window": 19}),
    "window longer than the sequence": (19, {"sliding_window": 64}),
    "window of one token": (13, {"sliding_window": 1}),
    "no dense layer": (23, {"num_dense_layers": 0}),
    "three dense layers": (23, {"num_dense_layers": 3}),
    "one KV head": (29, {"num_key_value_heads": 1}),
    "a KV head for every query head": (29, {"num_key_value_heads": 4}),
    "no shared expert": (21, {"num_shared_experts": 0}),
    "two shared experts": (21, {"num_shared_experts": 2}),
    "top-1 routing": (33, {"num_experts_per_tok": 1}),
    "top-5 routing": (33, {"num_experts_per_tok": 5}),
    "no embedding scale": (27, {"mup_enabled": False}),
    "heads wider than the model": (27, {"num_attention_heads": 6, "head_dim": 32}),
    "every second layer global": (31, {"global_attn_every_n_layers": 2}),
}
BATCH = 2
HF_SIGMA = 0.02  # transformers' own initializer_range
ROUNDING = 1e-7  # of the norm of all gradients together


def random_hf_model(config: AfmoeConfig, dtype: torch.dtype) -> Any:
    """transformers' model with every weight random, norm gains and expert biases as well.

    In bf16 a near tie between experts may go either way in either implementation. There the biases
    are far apart and the scores close together, so that no choice is a near tie; fp32 covers the
    others.
    """
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AfmoeForCausalLM(config)
    generator = torch.Generator().manual_seed(11)
    in_bf16 = dtype == torch.bfloat16
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("expert_bias"):
                spread = torch.randperm(len(noise), generator=generator) - len(noise) / 2
                parameter.copy_(0.3 * spread if in_bf16 else 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                sigma = HF_SIGMA if in_bf16 else initializer_sigma(config.hidden_size)
                parameter.copy_(sigma * noise)
    if in_bf16:
        model = model.to(dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # as transformers loads them, `_keep_in_fp32_modules`
                parameter.data = parameter.data.float()
    return model.eval()


def ours_from(hf_model: Any, config: AfmoeConfig, flags: tuple[str, ...] = ()) -> Any:
    from megatron.core.transformer.module import Float16Module

    from tests.trinity import load_whole_tensors

    model = build(parse(config, flags))
    if "--bf16" in flags:
        model = Float16Module(model.config, model)
    load_whole_tensors(getattr(model, "module", model), to_trinity(hf_model.state_dict(), config))
    return model.eval()


def tokens(config: AfmoeConfig, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(config.vocab_size, (BATCH, length), generator=generator)


def compare(
    rank: int, world_size: int, length: int, overrides: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """On one rank: how far ours is from transformers'."""
    from megatron_trinity.model.shards import whole_tensors

    config = afmoe_config(**overrides)
    hf_model = random_hf_model(config, dtype)
    ours = ours_from(hf_model, config, ("--bf16",) if dtype == torch.bfloat16 else ())
    ids = tokens(config, length)
    positions = torch.arange(length).expand(BATCH, length)
    expected, logits = hf_model(ids).logits, ours(ids, positions, None)
    result: dict[str, Any] = {"logits": (logits - expected).abs().max().item()}

    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (expected.float() * cotangent).sum().backward()
    (logits.float() * cotangent).sum().backward()
    module = getattr(ours, "module", ours)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.grad)
    mapped = to_hf(whole_tensors(module), config)
    reference = to_hf(
        to_trinity(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in hf_model.named_parameters()
            },
            config,
        ),
        config,
    )
    total = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    # Where theory says zero (a window of one token leaves queries no choice), both have rounding
    # only.
    result["gradients"] = {
        name: _relative(
            ((mapped[name] - gradient).norm() - ROUNDING * total).clamp(min=0), gradient
        )
        for name, gradient in reference.items()
        if not name.endswith("expert_bias")
    }

    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if name.endswith("expert_bias"):
                parameter.zero_()
        result["effect of the bias"] = (hf_model(ids).logits - expected).abs().max().item()
    return result


def _relative(error: torch.Tensor, gradient: torch.Tensor) -> float:
    return (error / gradient.norm()).item() if error > 0 else 0.0


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_in_fp32(ranks: RankPools, case: str) -> None:
    length, overrides = CASES[case]
    [result] = ranks.run(compare, length, overrides, torch.float32, world_size=1)
    assert result["effect of the bias"] > 1e-2, "the expert bias must change the selection"
    assert result["logits"] <= 1e-5
    worst = max(result["gradients"], key=result["gradients"].get)
    assert result["gradients"][worst] <= 1e-4, worst


@pytest.mark.parametrize("case", CASES)
def test_logits_in_bf16(ranks: RankPools, case: str) -> None:
    length, overrides = CASES[case]
    [result] = ranks.run(compare, length, overrides, torch.bfloat16, world_size=1)
    assert result["logits"] <= 2e-2
