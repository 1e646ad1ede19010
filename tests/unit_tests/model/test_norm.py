"""RMSNorm and the post-norm add against NumPy in fp64, and the gain that stays fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.module import Float16Module
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_trinity.model import compiling
from megatron_trinity.model.norm import PostNormAdd, TrinityRMSNorm, normalise
from tests.distributed.pool import RankPools
from tests.gpu_forms import as_if_compiled
from tests.live_bytes import SavedBytes
from tests.trinity import afmoe_config, build, parse

WIDTH = 48
EPS = 1e-5
INEXACT_IN_BF16 = 0.1 + 1e-4


def config(**changes: Any) -> Any:
    values = {
        "bf16": True,
        "fp16": False,
        "hidden_size": WIDTH,
        "layernorm_epsilon": EPS,
        "num_layers": 16,
        "sequence_parallel": False,
        "virtual_pipeline_model_parallel_size": None,
    }
    return SimpleNamespace(**{**values, **changes})


def norm_with_random_gain() -> TrinityRMSNorm:
    norm = TrinityRMSNorm(config=config(), hidden_size=WIDTH, eps=EPS)
    nn.init.normal_(norm.weight, 1.0, 0.3, generator=torch.Generator().manual_seed(1))
    return norm


def reference(hidden: torch.Tensor, gain: torch.Tensor) -> np.ndarray[Any, Any]:
    rows, weight = hidden.double().numpy(), gain.detach().double().numpy()
    scaled: np.ndarray[Any, Any] = (
        weight * rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + EPS)
    )
    return scaled


@pytest.mark.parametrize("shape", [(5, 2, WIDTH), (5, 2, 3, WIDTH)], ids=["hidden", "heads"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm_is_the_formula(shape: tuple[int, ...], size: float) -> None:
    hidden = size * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    norm = norm_with_random_gain()
    np.testing.assert_allclose(
        norm(hidden).detach().numpy(), reference(hidden, norm.weight), rtol=2e-6, atol=1e-7
    )


def test_bf16_input_gives_the_fp32_result_rounded_once() -> None:
    hidden = 30 * torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    norm = norm_with_random_gain()
    out = norm(hidden)
    assert out.dtype == torch.bfloat16
    exact = torch.from_numpy(reference(hidden, norm.weight))
    # Half a step of bf16's eight bits, and a little for the fp32 arithmetic in front of it.
    assert ((out.double() - exact).abs() / exact.abs().clamp(min=1e-3)).max() <= 2**-8 * 1.001


def gradients_of_the_formula(
    hidden: torch.Tensor, gain: torch.Tensor, cotangent: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of the hidden states and of the gain, by autograd in fp64."""
    rows, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, gain))
    formula = weight * rows / torch.sqrt(rows.square().mean(dim=-1, keepdim=True) + EPS)
    return torch.autograd.grad(formula, (rows, weight), cotangent.double())


@pytest.mark.parametrize("shape", [(64, WIDTH), (5, 2, WIDTH), (5, 2, 3, WIDTH), (0, 2, WIDTH)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_gradients_are_those_of_the_formula(shape: tuple[int, ...], size: float) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = (size * torch.randn(shape, generator=generator)).requires_grad_()
    cotangent = torch.randn(shape, generator=generator)
    norm = norm_with_random_gain()
    got = torch.autograd.grad(norm(hidden), (hidden, norm.weight), cotangent)
    for have, want in zip(
        got, gradients_of_the_formula(hidden, norm.weight, cotangent), strict=True
    ):
        assert have.dtype == torch.float32
        assert (have.double() - want).norm() <= 1e-6 * want.norm()


def test_gradients_of_tensors_that_are_not_contiguous() -> None:
    generator = torch.Generator().manual_seed(5)
    wide, cotangent = torch.randn(2, 2, 7, 2 * WIDTH, generator=generator)
    hidden = wide[..., ::2].transpose(0, 1).requires_grad_()
    norm = norm_with_random_gain()
    sparse = cotangent[..., 1::2].transpose(0, 1)
    got = torch.autograd.grad(norm(hidden), (hidden, norm.weight), sparse)
    for have, want in zip(got, gradients_of_the_formula(hidden, norm.weight, sparse), strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)


def test_bf16_gradients_are_rounded_once_and_the_gain_has_fp32() -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, cotangent = torch.randn(2, 64, WIDTH, generator=generator).bfloat16()
    hidden.requires_grad_()
    norm = norm_with_random_gain()
    of_hidden, of_gain = torch.autograd.grad(norm(hidden), (hidden, norm.weight), cotangent)
    assert of_hidden.dtype == torch.bfloat16
    assert of_gain.dtype == torch.float32
    exact, of_gain_exact = gradients_of_the_formula(hidden, norm.weight, cotangent)
    assert ((of_hidden.double() - exact).abs() / exact.abs().clamp(min=1e-2)).max() <= 2**-8 * 1.001
    torch.testing.assert_close(of_gain.double(), of_gain_exact, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["formula", "kernels"])
def by_kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Also as on a GPU."""
    with as_if_compiled() if request.param else nullcontext():
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_keeps_no_fp32_copy(by_kernels: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    hidden, cotangent = torch.randn(2, 64, 3, WIDTH, generator=generator).to(dtype)
    hidden.requires_grad_()
    norm = norm_with_random_gain()
    with SavedBytes() as saved:
        out = norm(hidden)
    assert saved.without(hidden, norm.weight) == 4 * 64 * 3  # a factor for each token
    assert out.dtype == dtype
    got = torch.autograd.grad(out, (hidden, norm.weight), cotangent)
    exact = gradients_of_the_formula(hidden, norm.weight, cotangent)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for have, want in zip((out, *got), (reference_of(hidden, norm), *exact), strict=True):
        assert (have.double() - want).norm() <= tolerance * want.norm()


def test_a_residual_is_added_to_the_result(by_kernels: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    hidden, residual, cotangent = torch.randn(3, 5, 2, WIDTH, generator=generator)
    norm = norm_with_random_gain()
    inputs = (hidden.requires_grad_(), residual.requires_grad_(), norm.weight)
    together, apart = norm(hidden, residual), residual + norm(hidden)
    assert torch.equal(together, apart)
    got = torch.autograd.grad(together, inputs, cotangent)
    expected = torch.autograd.grad(apart, inputs, cotangent)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.slow
def test_it_is_compiled_for_a_width_and_all_numbers_of_tokens() -> None:
    graphs: list[list[Any]] = []

    def note(graph: Any, inputs: list[Any]) -> Any:
        graphs.append([given.shape for given in inputs if isinstance(given, nn.Parameter)])
        return graph.forward

    function = compiling.compiled(normalise, backend=note)
    for shape in ((4, 2, 16), (5, 2, 16), (7, 3, 16), (4, 2, 3, 8), (9, 2, 3, 8)):
        hidden, gain = torch.randn(shape), nn.Parameter(torch.rand(shape[-1]))
        with torch.no_grad():
            got = function(hidden, gain, EPS)
        for one, other in zip(got, normalise(hidden, gain, EPS), strict=True):
            assert torch.equal(one, other)
    assert [width for [[width]] in graphs] == [16, 8]
    assert all(type(width) is int for [[width]] in graphs)


def reference_of(hidden: torch.Tensor, norm: TrinityRMSNorm) -> torch.Tensor:
    return torch.from_numpy(reference(hidden.detach(), norm.weight))


def test_recompute_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(5, 2, WIDTH, generator=generator).requires_grad_()
    norm = norm_with_random_gain()
    kept = torch.autograd.grad(norm(hidden).square().sum(), (hidden, norm.weight))
    again = checkpoint(norm, hidden, use_reentrant=False)
    recomputed = torch.autograd.grad(again.square().sum(), (hidden, norm.weight))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "to", "type", "wrapper"])
def test_the_gain_stays_fp32_bit_by_bit(cast: str) -> None:
    model = nn.Sequential(norm_with_random_gain(), nn.Linear(WIDTH, 2))
    norm = model[0]
    assert isinstance(norm, TrinityRMSNorm)
    nn.init.constant_(norm.weight, INEXACT_IN_BF16)
    before, parameter = norm.weight.detach().clone(), norm.weight
    if cast == "to":
        model.to(torch.bfloat16)
    elif cast == "type":
        model.type(torch.bfloat16)
    elif cast == "wrapper":
        Float16Module(config(), model)
    else:
        getattr(model, cast)()
    assert norm.weight is parameter
    assert norm.weight.dtype == torch.float32
    assert torch.equal(norm.weight, before)
    assert model[1].weight.dtype == (
        {"half": torch.float16, "float": torch.float32}.get(cast, torch.bfloat16)
    )


def test_the_gain_follows_the_device() -> None:
    norm = norm_with_random_gain().to("meta")
    assert norm.weight.is_meta
    assert norm.weight.dtype == torch.float32


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_gain_says_whether_its_gradient_is_a_part(sequence_parallel: bool) -> None:
    settings = config(sequence_parallel=sequence_parallel)
    norm = TrinityRMSNorm(config=settings, hidden_size=WIDTH, eps=EPS)
    assert getattr(norm.weight, "sequence_parallel") is sequence_parallel  # noqa: B009
    norm.bfloat16()
    assert getattr(norm.weight, "sequence_parallel") is sequence_parallel  # noqa: B009


def test_post_norm_add_is_the_outer_half_of_the_sandwich() -> None:
    generator = torch.Generator().manual_seed(6)
    output, residual = torch.randn(2, 5, 2, WIDTH, generator=generator)
    module = PostNormAdd(config())
    torch.testing.assert_close(module.norm.weight, torch.full((WIDTH,), 0.25), rtol=0, atol=0)
    for training in (False, True):
        got = module(training, False)((output, None), residual, 0.0)
        expected = residual.numpy() + reference(output, torch.full((WIDTH,), 0.25))
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("bias", "dropout"), [(torch.zeros(WIDTH), 0.0), (None, 0.1)])
def test_post_norm_add_refuses_what_trinity_has_not(
    bias: torch.Tensor | None, dropout: float
) -> None:
    hidden = torch.zeros(2, 1, WIDTH)
    with pytest.raises(ValueError, match="no bias and no dropout"):
        PostNormAdd(config())(True, False)((hidden, bias), hidden, dropout)


def gains_of_a_model(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    model = build(parse(afmoe_config(num_hidden_layers=5)))
    return {
        name: (parameter.min().item(), parameter.max().item())
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1
    }


def test_initial_gains_of_a_model(ranks: RankPools) -> None:
    [gains] = ranks.run(gains_of_a_model, world_size=1)
    outer = torch.tensor(5.0).double().rsqrt().float().item()
    expected = {"decoder.final_layernorm.weight": 1.0}
    for layer in range(5):
        prefix = f"decoder.layers.{layer}."
        expected |= {
            prefix + "input_layernorm.weight": 1.0,
            prefix + "self_attention.q_layernorm.weight": 1.0,
            prefix + "self_attention.k_layernorm.weight": 1.0,
            prefix + "self_attn_bda.norm.weight": outer,
            prefix + "pre_mlp_layernorm.weight": 1.0,
            prefix + "mlp_bda.norm.weight": outer,
        }
    assert gains == {name: (gain, gain) for name, gain in expected.items()}
