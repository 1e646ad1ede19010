"""The routed experts against a loop over the formula, and against Megatron's `SequentialMLP`."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_trinity.model import grouped_product
from megatron_trinity.model.experts import GroupedExperts, weighted_swiglu
from megatron_trinity.model.grouped_product import grouped_linear
from tests.distributed.pool import RankPools
from tests.gpu_forms import as_if_kernel
from tests.live_bytes import SavedBytes
from tests.trinity import afmoe_config, build, parse

COUNTS = (3, 0, 17, 1)
GROUPS, WIDTH, OUT = len(COUNTS), 24, 10


def groups(
    dtype: torch.dtype = torch.float32, out: int = OUT
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Tokens, a matrix for each group, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(sum(COUNTS), WIDTH, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(GROUPS, out, WIDTH, generator=generator).to(dtype)
    cotangent = torch.randn(sum(COUNTS), out, generator=generator).to(dtype)
    return tokens, [weight.clone().requires_grad_() for weight in weights], cotangent


def looped(tokens: Tensor, weights: list[Tensor]) -> Tensor:
    rows = tokens.split(COUNTS)
    return torch.cat([part @ weight.t() for part, weight in zip(rows, weights, strict=True)])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)
def test_grouped_linear_is_a_product_for_each_group(dtype: torch.dtype, tolerance: float) -> None:
    tokens, weights, cotangent = groups(dtype)
    got = grouped_linear(tokens, COUNTS, weights)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (tokens, *weights)]
    exact = looped(exact_inputs[0], exact_inputs[1:])
    pairs = [
        (got, exact),
        *zip(
            torch.autograd.grad(got, (tokens, *weights), cotangent),
            torch.autograd.grad(exact, exact_inputs, cotangent.double()),
            strict=True,
        ),
    ]
    for have, want in pairs:
        assert have.dtype == dtype
        assert have.shape == want.shape
        assert (have.double() - want).norm() <= tolerance * want.norm()


def test_a_group_without_rows_has_a_gradient_of_zeros() -> None:
    tokens, weights, cotangent = groups()
    grouped_linear(tokens, COUNTS, weights).backward(cotangent)
    assert weights[1].grad is not None
    assert torch.equal(weights[1].grad, torch.zeros(OUT, WIDTH))
    nobody = tokens[:0].detach().requires_grad_()
    grouped_linear(nobody, (0,) * GROUPS, weights).backward(cotangent[:0])
    assert nobody.grad is not None
    assert nobody.grad.shape == (0, WIDTH)


def test_a_gradient_that_is_not_contiguous() -> None:
    tokens, weights, cotangent = groups()
    transposed = cotangent.t().contiguous().t()
    got = torch.autograd.grad(grouped_linear(tokens, COUNTS, weights), tokens, transposed)[0]
    torch.testing.assert_close(
        got, torch.autograd.grad(looped(tokens, weights), tokens, cotangent)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 37])
def test_weighted_swiglu_keeps_its_inputs_alone(dtype: torch.dtype, rows: int) -> None:
    """And gives what autograd gives, bit by bit."""
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(rows, 2 * WIDTH, generator=generator).to(dtype).requires_grad_()
    factors = torch.rand(rows, generator=generator).requires_grad_()
    cotangent = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    want = (F.silu(gate) * up * factors.unsqueeze(-1)).to(dtype)
    with SavedBytes() as saved:
        got = weighted_swiglu(both, factors)
    assert saved.without(both, factors) == 0
    pairs = zip(
        (got, *torch.autograd.grad(got, (both, factors), cotangent)),
        (want, *torch.autograd.grad(want, (both, factors), cotangent)),
        strict=True,
    )
    for have, expected in pairs:
        assert have.dtype == expected.dtype
        assert torch.equal(have, expected)


@pytest.mark.parametrize("spare", [0, 8], ids=["apart", "evenly spaced"])
def test_the_grouped_product_is_the_loop(spare: int) -> None:
    """Also where weights are views of one buffer, as behind DistributedDataParallel."""
    tokens, weights, cotangent = groups(torch.bfloat16, out=16)
    if spare:
        buffer = torch.zeros(GROUPS * (weights[0].numel() + spare), dtype=torch.bfloat16)
        views = [row[:-spare].view(16, WIDTH) for row in buffer.view(GROUPS, -1)]
        for view, weight in zip(views, weights, strict=True):
            view.copy_(weight.detach())
        weights = [view.requires_grad_() for view in views]
    in_place = grouped_product.stacked(weights).data_ptr() == weights[0].data_ptr()
    assert in_place == bool(spare)
    assert torch.equal(grouped_product.stacked(weights), torch.stack(weights))
    with as_if_kernel() as calls:
        product = grouped_product.product_by_group(tokens, torch.tensor(COUNTS), (WIDTH, 16))
        got = product(tokens, weights)
        gradients = torch.autograd.grad(got, (tokens, *weights), cotangent.t().contiguous().t())
    assert calls.call_count == 3
    want = grouped_linear(tokens, COUNTS, weights)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients, torch.autograd.grad(want, (tokens, *weights), cotangent))


def test_weights_in_another_order_are_copied() -> None:
    """Megatron's buffers begin with the last parameter."""
    buffer = torch.randn(3, 16, 8)
    for weights in ([*buffer.unbind()][::-1], [buffer[0], buffer[2], buffer[1]], [buffer[0].t()]):
        assert torch.equal(grouped_product.stacked(weights), torch.stack(weights))


def test_the_grouped_product_is_for_aligned_rows_on_a_device_with_a_kernel() -> None:
    tokens = torch.randn(sum(COUNTS), WIDTH).bfloat16()
    weights = [torch.randn(OUT, WIDTH).bfloat16()] * GROUPS
    nobody = torch.zeros(GROUPS, dtype=torch.int64)
    with as_if_kernel() as calls:
        # 10 features of two bytes; no rows at all.
        grouped_product.product_by_group(tokens, torch.tensor(COUNTS), (WIDTH, OUT))(
            tokens, weights
        )
        grouped_product.product_by_group(tokens[:0], nobody, (WIDTH,))(tokens[:0], weights)
    assert not calls.called
    assert not grouped_product.has_kernel(torch.device("cpu"), torch.bfloat16)
    assert not grouped_product.has_kernel(torch.device("cuda"), torch.float32)


def test_the_host_does_not_wait_for_the_sizes_of_groups(ranks: RankPools) -> None:
    ranks.run(experts_without_values, world_size=1)


def experts_without_values(rank: int, world_size: int) -> None:
    """Forward and backward on the device `meta`, where nothing has a value to be waited for."""
    experts = experts_of_a_model(()).to(device="meta", dtype=torch.bfloat16)
    counts = torch.ones(8, dtype=torch.int64, device="meta")
    hidden = experts.config.hidden_size
    tokens = torch.ones(8, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with as_if_kernel():
        out, _ = experts(tokens, counts, torch.ones(8, device="meta"))
        out.sum().backward()
    assert tokens.grad is not None
    assert all(weight.grad is not None for weight in experts.parameters())
    with pytest.raises(RuntimeError):  # the loop needs them
        experts(tokens, counts, torch.ones(8, device="meta"))


def experts_of_a_model(flags: tuple[str, ...]) -> GroupedExperts:
    model = build(parse(afmoe_config(), flags))
    experts = model.decoder.layers[1].mlp.experts
    assert isinstance(experts, GroupedExperts)
    return experts


def beside_sequential(
    rank: int, world_size: int, counts: tuple[int, ...], flags: tuple[str, ...], kernel: bool
) -> tuple[list[dict[str, Tensor]], int]:
    """Output and gradients: ours, Megatron's loop over the same weights, and the formula's; and how
    many grouped products ours took, where torch is said to have a `kernel` for them or not."""
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    experts = experts_of_a_model(flags)
    dtype = torch.bfloat16 if "--bf16" in flags else torch.float32
    experts.to(dtype)
    linears = MLPSubmodules(
        linear_fc1=tensor_parallel.ColumnParallelLinear,
        linear_fc2=tensor_parallel.RowParallelLinear,
    )
    sequential = SequentialMLP(
        len(counts),
        experts.config,
        linears,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    ).to(dtype)
    sequential.load_state_dict(experts.state_dict())  # the same names and shapes

    generator = torch.Generator().manual_seed(2)
    hidden = experts.config.hidden_size
    tokens, cotangent = torch.randn(2, sum(counts), hidden, generator=generator).to(dtype)
    probabilities = torch.rand(sum(counts), generator=generator)

    results = []
    with as_if_kernel(kernel) as products:
        for module, compute in (
            (experts, experts),
            (sequential, sequential),
            (experts, partial(formula, experts)),
        ):
            x, p = tokens.clone().requires_grad_(), probabilities.clone().requires_grad_()
            module.zero_grad()
            out, bias = compute(x, torch.tensor(counts), p)
            assert bias is None
            out.backward(cotangent.to(out.dtype))
            weights = {name: weight.grad for name, weight in module.named_parameters()}
            results.append(
                {"output": out.detach(), "tokens": x.grad, "probabilities": p.grad, **weights}
            )
    return results, products.call_count


def formula(
    experts: GroupedExperts, tokens: Tensor, counts: Tensor, probabilities: Tensor
) -> tuple[Tensor, None]:
    """fp64: of each token down(silu(gate) * up), times its probability."""
    outputs = []
    sizes = counts.tolist()
    parts = zip(tokens.split(sizes), probabilities.split(sizes), experts.local_experts, strict=True)
    for rows, weights, expert in parts:
        gate, up = (rows.double() @ expert.linear_fc1.weight.double().t()).chunk(2, dim=-1)
        down = (F.silu(gate) * up) @ expert.linear_fc2.weight.double().t()
        outputs.append(weights.double().unsqueeze(1) * down)
    return torch.cat(outputs), None


@pytest.mark.parametrize("kernel", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("counts", [(5, 0, 9, 1, 0, 0, 30, 3), (0, 0, 0, 0, 0, 7, 0, 0)])
@pytest.mark.parametrize(
    ("flags", "tolerance"), [((), 2e-6), (("--bf16",), 2e-2)], ids=["fp32", "bf16"]
)
def test_experts_are_the_formula_and_megatrons(
    ranks: RankPools,
    counts: tuple[int, ...],
    flags: tuple[str, ...],
    tolerance: float,
    kernel: bool,
) -> None:
    [result] = ranks.run(beside_sequential, counts, flags, kernel, world_size=1)
    (ours, megatrons, exact), products = result
    # Two layers: forward a product each, backward two.
    assert products == (6 if kernel else 0)
    assert ours.keys() == megatrons.keys() == exact.keys()
    assert "local_experts.7.linear_fc2.weight" in ours
    for name, have in ours.items():
        assert have.dtype == megatrons[name].dtype, name
        assert have.shape == exact[name].shape, name
        assert (have.double() - exact[name].double()).norm() <= tolerance * exact[name].norm(), name
    idle = [expert for expert, count in enumerate(counts) if count == 0]
    for expert in idle:
        assert not ours[f"local_experts.{expert}.linear_fc1.weight"].any()


def parameters_and_keys(rank: int, world_size: int) -> tuple[dict[str, Any], list[str]]:
    """Attributes that Megatron reads of this rank's expert weights, and their checkpoint keys."""
    flags = ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "2")
    experts = experts_of_a_model(flags)
    read = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")
    attributes = {
        name: (tuple(weight.shape), *(getattr(weight, attribute) for attribute in read))
        for name, weight in experts.named_parameters()
    }
    state = experts.sharded_state_dict(prefix="decoder.layers.1.mlp.experts.")
    return attributes, sorted({entry.key for entry in state.values() if "weight" in entry.key})


def test_parameters_and_checkpoint_keys_are_megatrons(ranks: RankPools) -> None:
    for attributes, keys in ranks.run(parameters_and_keys, world_size=4):
        # 8 experts on 2 ranks, each of width 48 on 2 ranks; gate and up are one matrix.
        assert attributes == {
            f"local_experts.{expert}.{name}.weight": values
            for expert in range(4)
            for name, values in {
                "linear_fc1": ((48, 64), True, 0, 2, False),
                "linear_fc2": ((64, 24), True, 1, 1, False),
            }.items()
        }
        assert keys == [
            f"decoder.layers.1.mlp.experts.experts.linear_{layer}.weight"
            for layer in ("fc1", "fc2")
        ]


def test_hooks_ahead_of_a_layer_are_called(ranks: RankPools) -> None:
    """Under `--overlap-param-gather` they wait for the weights that the layer is about to use."""
    [called] = ranks.run(layers_whose_hooks_are_called, world_size=1)
    assert called == [(expert, layer) for layer in ("fc1", "fc2") for expert in range(8)]


def layers_whose_hooks_are_called(rank: int, world_size: int) -> list[tuple[int, str]]:
    experts = experts_of_a_model(())
    called: list[tuple[int, str]] = []
    for number, expert in enumerate(experts.local_experts):
        for layer in ("fc1", "fc2"):
            getattr(expert, f"linear_{layer}").register_forward_pre_hook(
                lambda *_, key=(number, layer): called.append(key)
            )
    counts = torch.tensor([1] * 8)
    experts(torch.randn(8, experts.config.hidden_size), counts, torch.ones(8))
    return called
