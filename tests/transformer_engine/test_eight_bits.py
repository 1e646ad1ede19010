"""The emulated FP8: each rounding bit by bit against its definition, each product by its error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.pool import RankPools

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Half of the distance between two numbers, relative to the smaller: 3 and 2 bits of mantissa.
HALF_STEP = {E4M3: 2**-4, E5M2: 2**-3}
FORMATS = {  # recipe to the formats of inputs and weights, and of gradients of outputs
    "tensorwise": (E4M3, E5M2),
    "blockwise": (E4M3, E4M3),
    "delayed": (E4M3, E5M2),
    "mxfp8": (E4M3, E4M3),
}


def nearest(values: Tensor, eight: torch.dtype) -> Tensor:
    """The number of a format that is nearest, of two the one with an even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(eight).double()
    finite = numbers.isfinite() & ~((numbers == 0) & numbers.signbit())
    codes, numbers = codes[finite], numbers[finite]
    distance = (values.double().flatten()[:, None] - numbers).abs()
    ties = distance == distance.amin(1, keepdim=True)
    even = (codes.int() % 2 == 0).expand_as(ties)
    choice = (ties * (1 + even.int())).argmax(1)
    return numbers[choice].reshape(values.shape).float()


def scaled(values: Tensor, eight: torch.dtype, power_of_two: bool) -> Tensor:
    """A tile, scaled until its largest value is the format's, rounded and scaled back."""
    largest = values.abs().max().float()
    scale = torch.tensor(torch.finfo(eight).max) / largest if largest > 0 else torch.tensor(1.0)
    if power_of_two:
        scale = 2.0 ** torch.floor(torch.log2(scale.double()))
    scale = scale.float()
    return nearest(values.float() * scale, eight) * (1.0 / scale)


def tiled(values: Tensor, high: int, wide: int, eight: torch.dtype) -> Tensor:
    result = torch.empty(values.shape)
    for top in range(0, values.shape[0], high):
        for left in range(0, values.shape[1], wide):
            tile = slice(top, top + high), slice(left, left + wide)
            result[tile] = scaled(values[tile], eight, power_of_two=True)
    return result


def uneven(rows: int, columns: int) -> Tensor:
    """Values over many powers of two, zeros and ties among them; in bf16 as activations are."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(rows, columns, generator=generator)
    values *= 2.0 ** torch.randint(-12, 3, (rows, columns), generator=generator)
    values[0, :4] = torch.tensor([0.0, 1.0625, 1.1875, -1.0625])
    values[3] = 0.0
    return values.bfloat16()


def roundings(rank: int, world_size: int, rows: int, columns: int) -> dict[str, Tensor]:
    """What each quantizer of Transformer Engine makes of one matrix, both of its copies."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor import (
        Float8BlockQuantizer,
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
        MXFP8Quantizer,
    )

    from tests.transformer_engine.emulation.quantized import operand

    both: dict[str, Any] = {"rowwise": True, "columnwise": True}
    found = {}
    for name, kind in (("e4m3", DType.kFloat8E4M3), ("e5m2", DType.kFloat8E5M2)):
        amax = torch.zeros(1)
        quantizers = {
            "current": Float8CurrentScalingQuantizer(kind, torch.device("cpu"), **both),
            "delayed": Float8Quantizer(torch.tensor([96.0]), amax, kind, **both),
            "rows": Float8BlockQuantizer(kind, block_scaling_dim=1, **both),
            "squares": Float8BlockQuantizer(kind, block_scaling_dim=2, **both),
            "runs": MXFP8Quantizer(kind, **both),
        }
        for which, quantizer in quantizers.items():
            tensor = quantizer(uneven(rows, columns))
            found[f"{name} {which}"] = operand(tensor, columnwise=False)
            found[f"{name} {which}, columns"] = operand(tensor, columnwise=True)
            own = tensor.dequantize(dtype=torch.float32)  # Transformer Engine's, from Python
            assert torch.equal(own, found[f"{name} {which}"]), which
        found[f"{name} largest"] = amax
    return found


# The second has tiles that are not whole.
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (96, 160)])
def test_roundings_bit_by_bit(te_ranks: RankPools, rows: int, columns: int) -> None:
    [found] = te_ranks.run(roundings, rows, columns, world_size=1)
    values = uneven(rows, columns)
    for name, eight in (("e4m3", E4M3), ("e5m2", E5M2)):
        current = scaled(values, eight, power_of_two=False)
        # A given scale may be too large for what has come since, which is cut off at the ends.
        ends = torch.finfo(eight).max
        delayed = nearest((values.float() * 96).clamp(-ends, ends), eight) * (
            1.0 / torch.tensor(96)
        )
        squares = tiled(values, 128, 128, eight)
        expected = {
            "current": current,
            "current, columns": current,
            "delayed": delayed,
            "delayed, columns": delayed,
            "rows": tiled(values, 1, 128, eight),
            "rows, columns": tiled(values, 128, 1, eight),
            "squares": squares,
            "squares, columns": squares,
            "runs": tiled(values, 1, 32, eight),
            "runs, columns": tiled(values, 32, 1, eight),
        }
        for which, tensor in expected.items():
            assert torch.equal(found[f"{name} {which}"], tensor), (name, which)
        assert found[f"{name} largest"] == values.abs().max()
    assert (values.float() * 96).abs().max() > 448, "nothing was cut off"


def te_recipe(name: str) -> Any:
    from transformer_engine.common import recipe

    return {
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "delayed": lambda: recipe.DelayedScaling(amax_history_len=4),
        "mxfp8": recipe.MXFP8BlockScaling,
    }[name]()


TOKENS, IN, OUT = 64, 256, 128


def products(rank: int, world_size: int, name: str, grouped: bool) -> dict[str, Any]:
    """Results of the three products of a layer in FP8, their exact values and their formats."""
    import transformer_engine.pytorch as te

    from tests.transformer_engine.emulation.products import products as made

    torch.manual_seed(5)
    x = torch.randn(TOKENS, IN).bfloat16().requires_grad_()
    cotangent = torch.randn(TOKENS, OUT).bfloat16()
    splits = [32, 0, 32] if grouped else [TOKENS]
    kind: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16, "device": "cpu"}
    layer = te.GroupedLinear(3, IN, OUT, **kind) if grouped else te.Linear(IN, OUT, **kind)
    weights = [p for n, p in layer.named_parameters() if n.startswith("weight")]
    for weight in weights:
        weight.data.normal_()
    recipe = te_recipe(name)
    for _ in range(2):  # delayed scaling knows a scale from the second time on
        made.clear()
        with te.autocast(enabled=True, recipe=recipe):
            y = layer(x, splits) if grouped else layer(x)
        got = [y.detach(), *torch.autograd.grad(y, [x, *weights], cotangent)]
    exact: list[list[Tensor]] = [[], [], []]
    bounds: list[list[Tensor]] = [[], [], []]
    for a, w, g in zip(x.split(splits), weights, cotangent.split(splits), strict=True):
        a, w, g = (tensor.detach().double() for tensor in (a, w, g))
        for at, (left, right) in enumerate(((a, w.t()), (g, w), (g.t(), a))):
            exact[at].append(left @ right)
            bounds[at].append(left.abs() @ right.abs())
    stack = lambda parts, at: torch.stack(parts) if at == 2 else torch.cat(parts)  # noqa: E731
    return {
        "got": [got[0], got[1], torch.stack(got[2:])],
        "exact": [stack(parts, at) for at, parts in enumerate(exact)],
        "bounds": [stack(parts, at) for at, parts in enumerate(bounds)],
        "made": list(made),
    }


@pytest.mark.parametrize("grouped", [False, True], ids=["linear", "grouped"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_a_product_is_that_of_its_formats(
    te_ranks: RankPools, name: str, grouped: bool
) -> None:
    [found] = te_ranks.run(products, name, grouped, world_size=1)
    of_values, of_gradients = FORMATS[name]
    values = HALF_STEP[of_values]
    gradients = HALF_STEP[of_gradients]
    # (1 + a)(1 + b) - 1 for each term of the sum, and what bf16 rounds of the result. Numbers too
    # small for the format are off by more than half a step, of which there are few and small ones.
    worst = [(1 + values) ** 2 - 1, *[(1 + values) * (1 + gradients) - 1] * 2]
    for at, which in enumerate(("output", "input", "weight")):
        got, exact, bound = (found[kind][at].double() for kind in ("got", "exact", "bounds"))
        error = (got - exact).abs()
        allowed = (worst[at] + 2**-8) * bound
        assert (error <= allowed).all(), which
        # Errors of terms are independent: together they are as large as a rounding that is evenly
        # spread, 1/sqrt(3) of half a step, whose numbers lie up to a factor 2 above the smallest.
        relative = float(error.norm() / exact.norm())
        steps = (values, (gradients if at else values))
        typical = sum(step**2 for step in steps) ** 0.5 / 3**0.5
        assert typical / 2 < relative < typical, (which, relative, typical)
    counts = {which: [p.formats for p in found["made"] if p.which == which] for which in
              ("output", "input", "weight")}  # fmt: skip
    layers = 2 if grouped else 1  # a group without rows is no product
    assert counts == {
        "output": [(of_values, of_values)] * layers,
        "input": [(of_values, of_gradients)] * layers,
        "weight": [(of_values, of_gradients)] * layers,
    }


def padded(rank: int, world_size: int) -> list[Tensor]:
    """Runs of rows, with zeros behind them to a multiple of 16, and without them again."""
    from megatron.core.extensions.transformer_engine import Fp8Padding, Fp8Unpadding

    x = uneven(21, 32).requires_grad_()
    rows, lengths = Fp8Padding(3, 16)(x, [5, 0, 16])
    assert lengths == [16, 0, 16]
    back = Fp8Unpadding(3, 16)(rows, [5, 0, 16])
    [gradient] = torch.autograd.grad(back, x, x.detach())
    return [x.detach(), rows.detach(), back.detach(), gradient]


def test_padding_is_of_zeros_and_comes_off(te_ranks: RankPools) -> None:
    [(x, rows, back, gradient)] = te_ranks.run(padded, world_size=1)
    assert torch.equal(rows[:5], x[:5])
    assert torch.equal(rows[16:], x[5:])
    assert not rows[5:16].any()
    assert torch.equal(back, x)
    assert torch.equal(gradient, x)
