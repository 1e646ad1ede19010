"""One update, whatever the layout: that of plain Muon and AdamW on the Hugging Face matrices."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_trinity.optimizer.newton_schulz import flops
from tests.crosses import slow
from tests.distributed.pool import RankPools
from tests.optimizer import (
    Part,
    build_optimizer,
    canonical_shapes,
    config,
    held_weights,
    random_tensors,
    set_gradients,
    whole,
)

STEPS = 2
MUON = {"lr": 2e-3, "decay": 0.1, "momentum": 0.95}
ADAMW = {"lr": 1e-3, "decay": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
QUINTIC = (  # Dion's, as the public code nearest to the report has them
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

TP = ("--sequence-parallel", "--expert-tensor-parallel-size", "1", "--tensor-model-parallel-size")
SHARDED = ("--use-distributed-optimizer",)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "DP 2": (2, ()),
    "DP 2 sharded": (2, SHARDED),
    "DP 3 sharded": (3, SHARDED),
    "DP 4, two instances": (4, (*SHARDED, "--num-distributed-optimizer-instances", "2")),
    "CP 2 sharded": (2, (*SHARDED, "--context-parallel-size", "2")),
    "TP 2": (2, (*TP, "2")),
    "TP 4, more than query groups": (4, (*TP, "4")),
    "TP 8": (8, (*TP, "8")),
    "TP 2, DP 2 sharded": (4, (*TP, "2", *SHARDED)),
    "PP 2": (2, ("--pipeline-model-parallel-size", "2")),
    "EP 2": (2, ("--expert-model-parallel-size", "2")),
    "EP 4, DP 4 sharded": (4, ("--expert-model-parallel-size", "4", *SHARDED)),
    "ETP 2, DP 2": (2, ("--expert-tensor-parallel-size", "2")),
    "TP 2, ETP 2, EP 2, DP 2 sharded": (
        8,
        (
            *("--sequence-parallel", "--tensor-model-parallel-size", "2"),
            *("--expert-tensor-parallel-size", "2", "--expert-model-parallel-size", "2"),
            *SHARDED,
        ),
    ),
    "TP 2, PP 2, EP 2, DP 2 sharded": (
        8,
        (
            *(*TP, "2", "--pipeline-model-parallel-size", "2"),
            *("--expert-model-parallel-size", "2", *SHARDED),
        ),
    ),
}


def plain_newton_schulz(matrix: Tensor) -> Tensor:
    x = matrix.double()
    x = x / x.norm()
    if x.shape[0] > x.shape[1]:
        x = x.T
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def plain_muon(weight: Tensor, gradients: Sequence[Tensor], nesterov: bool = False) -> Tensor:
    w, momentum = weight.double(), torch.zeros_like(weight).double()
    scale = math.sqrt(max(1.0, w.shape[0] / w.shape[1]))
    for gradient in gradients:
        momentum = MUON["momentum"] * momentum + gradient.double()
        direction = gradient + MUON["momentum"] * momentum if nesterov else momentum
        w = (1 - MUON["lr"] * MUON["decay"]) * w
        w = w - MUON["lr"] * scale * plain_newton_schulz(direction)
    return w


def plain_adamw(weight: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    w = weight.double()
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for step, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        mean = ADAMW["beta1"] * mean + (1 - ADAMW["beta1"]) * g
        square = ADAMW["beta2"] * square + (1 - ADAMW["beta2"]) * g * g
        w = (1 - ADAMW["lr"] * ADAMW["decay"]) * w
        corrected = (square / (1 - ADAMW["beta2"] ** step)).sqrt() + ADAMW["eps"]
        w = w - ADAMW["lr"] * mean / (1 - ADAMW["beta1"] ** step) / corrected
    return w


def hf_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors under Hugging Face names, without the expert biases."""
    from megatron_trinity.checkpoint.hf.mapping import to_hf

    biases = {f"decoder.layers.{i}.mlp.router.expert_bias": torch.zeros(8) for i in (1, 2, 3)}
    converted = to_hf({**tensors, **biases}, config())
    return {name: t for name, t in converted.items() if not name.endswith("expert_bias")}


def start(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return hf_tensors(random_tensors(shapes, seed=1))


def expected(
    shapes: Mapping[str, Sequence[int]],
    weights: Mapping[str, Tensor],
    router: str = "muon",
    nesterov: bool = False,
) -> dict[str, Tensor]:
    """Hugging Face name to the weights that plain optimizers end with."""
    gradients = [hf_tensors(random_tensors(shapes, seed=2 + step)) for step in range(STEPS)]
    updated = {}
    for name, weight in weights.items():
        of_name = [g[name] for g in gradients]
        of_adamw = weight.ndim == 1 or name.startswith(("model.embed_tokens", "lm_head"))
        of_adamw |= router == "adamw" and name.endswith("router.gate.weight")
        updated[name] = (
            plain_adamw(weight, of_name) if of_adamw else plain_muon(weight, of_name, nesterov)
        )
    return updated


def train(
    rank: int, world_size: int, flags: Sequence[str], shapes: dict[str, tuple[int, ...]]
) -> tuple[list[Part], float]:
    """Two steps; returns the rank's weights and the last gradient norm."""
    model, optimizer = build_optimizer(flags, random_tensors(shapes, seed=1))
    for step in range(STEPS):
        set_gradients(model, random_tensors(shapes, seed=2 + step))
        applied, norm, _ = optimizer.step()
        assert applied
    return held_weights(model), norm


@pytest.fixture(scope="module")
def shapes(ranks: RankPools) -> dict[str, tuple[int, ...]]:
    [found] = ranks.run(canonical_shapes, world_size=1)
    return dict(found)


def check(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], start: Any) -> None:
    """To 1e-5 of the weights, and to 1e-4 of what they have moved by."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
        assert (got[name] - tensor).norm() <= 1e-4 * (tensor - start[name]).norm(), name


QUICK = ("one rank", "DP 4, two instances", "TP 2, DP 2 sharded", "PP 2", "EP 2")
ALL = [layout if layout in QUICK else slow(layout) for layout in LAYOUTS]


@pytest.mark.parametrize("layout", ALL)
def test_an_update_is_that_of_plain_optimizers(
    ranks: RankPools, shapes: dict[str, tuple[int, ...]], layout: str
) -> None:
    world_size, flags = LAYOUTS[layout]
    answers = ranks.run(train, flags, shapes, world_size=world_size)
    tensors = whole(shapes, [part for parts, _ in answers for part in parts])
    check(hf_tensors(tensors), expected(shapes, start(shapes)), start(shapes))
    gradients = random_tensors(shapes, seed=1 + STEPS).values()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert [n for _, n in answers] == pytest.approx([norm] * world_size, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (("--router-optimizer", "adamw"), {"router": "adamw"}),
        (("--muon-nesterov",), {"nesterov": True}),
    ],
)
def test_flags_that_change_the_update(
    ranks: RankPools,
    shapes: dict[str, tuple[int, ...]],
    flags: tuple[str, ...],
    changes: dict[str, Any],
) -> None:
    world_size, layout = LAYOUTS["TP 2, DP 2 sharded"]
    answers = ranks.run(train, (*layout, *flags), shapes, world_size=world_size)
    tensors = hf_tensors(whole(shapes, [part for parts, _ in answers for part in parts]))
    before = start(shapes)
    check(tensors, expected(shapes, before, **changes), before)
    with pytest.raises(AssertionError):
        check(tensors, expected(shapes, before), before)


@pytest.mark.parametrize("layout", ["one rank", "DP 2", "TP 2, DP 2 sharded"])
def test_bf16_weights_are_rounded_from_fp32_ones(
    ranks: RankPools, shapes: dict[str, tuple[int, ...]], layout: str
) -> None:
    world_size, flags = LAYOUTS[layout]
    answers = ranks.run(train, (*flags, "--bf16"), shapes, world_size=world_size)
    got = hf_tensors(whole(shapes, [part for parts, _ in answers for part in parts]))
    before = {k: t if t.ndim == 1 else t.bfloat16().float() for k, t in start(shapes).items()}
    for name, tensor in expected(shapes, before).items():
        if tensor.ndim == 1:  # gains are fp32 in a bf16 model
            torch.testing.assert_close(got[name].double(), tensor, atol=1e-6, rtol=1e-6)
        else:  # a step is less than bf16 resolves: all are right only if fp32 weights are kept
            wrong = (got[name] != tensor.bfloat16().float()).double().mean()
            assert wrong < 0.01, name


def state_of_rank(
    rank: int, world_size: int, flags: Sequence[str], shapes: dict[str, tuple[int, ...]]
) -> tuple[int, list[tuple[Any, tuple[int, int]]]]:
    """Elements of momentum and moments that the rank keeps, and matrices that it works on."""
    _, optimizer = build_optimizer(flags, random_tensors(shapes, seed=1))
    kept = 0
    for tensors in optimizer.state_dict()["state"].values():
        for name, parts in tensors.items():
            kept += sum(t.numel() for t in parts.values() if name != "fp32_param")
    return kept, optimizer.work()


@pytest.mark.parametrize("layout", ALL)
def test_each_matrix_is_the_work_of_one_rank(
    ranks: RankPools, shapes: dict[str, tuple[int, ...]], layout: str
) -> None:
    world_size, flags = LAYOUTS[layout]
    answers = ranks.run(state_of_rank, flags, shapes, world_size=world_size)
    done = Counter(name for _, work in answers for name, _ in work)
    instances = 2 if "instances" in layout else 1
    assert set(done.values()) == {instances}
    matrices = [name for name, tensor in start(shapes).items() if tensor.ndim == 2]
    assert len(done) == len(matrices) - 2  # all but embedding and output


@pytest.mark.parametrize(
    ("layout", "copies"),
    [("one rank", 1), ("DP 2", 2), ("DP 3 sharded", 1), ("DP 4, two instances", 2)],
)
def test_state_is_kept_as_often_as_it_should_be(
    ranks: RankPools, shapes: dict[str, tuple[int, ...]], layout: str, copies: int
) -> None:
    """One momentum of what Muon updates, two moments of what AdamW updates."""
    world_size, flags = LAYOUTS[layout]
    answers = ranks.run(state_of_rank, flags, shapes, world_size=world_size)
    total = sum(
        math.prod(shape) * (2 if re.search("embedding|output|norm", key) else 1)
        for key, shape in shapes.items()
    )
    kept = [of_rank for of_rank, _ in answers]
    assert sum(kept) == copies * total
    assert max(kept) < 1.3 * copies * total / world_size


def test_work_is_balanced_by_flops(ranks: RankPools, shapes: dict[str, tuple[int, ...]]) -> None:
    for layout in ("DP 2 sharded", "DP 3 sharded", "EP 4, DP 4 sharded", "TP 2, DP 2 sharded"):
        world_size, flags = LAYOUTS[layout]
        answers = ranks.run(state_of_rank, flags, shapes, world_size=world_size)
        loads = [sum(flops(*shape, steps=5) for _, shape in work) for _, work in answers]
        assert max(loads) < 1.2 * sum(loads) / world_size, layout


def clipped(
    rank: int, world_size: int, flags: Sequence[str], shapes: dict[str, tuple[int, ...]]
) -> tuple[list[Part], float]:
    """One step with a gradient norm of 1 at most; the gradients' norm is far above."""
    weights = random_tensors(shapes, seed=1)
    model, optimizer = build_optimizer((*flags, "--clip-grad", "1.0"), weights)
    set_gradients(model, random_tensors(shapes, seed=2))
    _, norm, _ = optimizer.step()
    return held_weights(model), norm


@pytest.mark.parametrize("layout", ["one rank", "TP 2, PP 2, EP 2, DP 2 sharded"])
def test_clipping_leaves_the_direction_of_one_muon_step(
    ranks: RankPools, shapes: dict[str, tuple[int, ...]], layout: str
) -> None:
    """Newton-Schulz divides by the norm: what clipping changes is a gradient's part in momentum."""
    world_size, flags = LAYOUTS[layout]
    answers = ranks.run(clipped, flags, shapes, world_size=world_size)
    got = hf_tensors(whole(shapes, [part for parts, _ in answers for part in parts]))
    gradients = random_tensors(shapes, seed=2)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert norm > 10
    assert [n for _, n in answers] == pytest.approx([norm] * world_size, rel=1e-6)
    before, of_gradients = start(shapes), hf_tensors(gradients)
    for name in (
        "model.layers.1.self_attn.gate_proj.weight",
        "model.layers.3.mlp.experts.7.up_proj.weight",
    ):
        wanted = plain_muon(before[name], [of_gradients[name] / norm])
        torch.testing.assert_close(got[name].double(), wanted, atol=1e-6, rtol=0)
    name = "lm_head.weight"
    wanted = plain_adamw(before[name], [of_gradients[name] / norm])
    torch.testing.assert_close(got[name].double(), wanted, atol=1e-6, rtol=0)


def broken_step(
    rank: int, world_size: int, flags: Sequence[str], shapes: dict[str, tuple[int, ...]]
) -> tuple[bool, float, bool]:
    """Whether a step with one NaN is applied, its norm, and whether all state is as before."""
    weights = random_tensors(shapes, seed=1)
    model, optimizer = build_optimizer(flags, weights)
    gradients = random_tensors(shapes, seed=2)
    gradients["decoder.layers.2.mlp.experts.experts.linear_fc2.weight"][5, 3, 3] = float("nan")
    set_gradients(model, gradients)
    before = [tensor.clone() for unit in optimizer.units for tensor in unit.state.values()]
    applied, norm, _ = optimizer.step()
    after = [tensor for unit in optimizer.units for tensor in unit.state.values()]
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return applied, norm, same and bool(before)


@pytest.mark.parametrize("layout", ["one rank", "TP 2, PP 2, EP 2, DP 2 sharded"])
def test_gradients_that_are_not_finite_change_nothing(
    ranks: RankPools, shapes: dict[str, tuple[int, ...]], layout: str
) -> None:
    world_size, flags = LAYOUTS[layout]
    for applied, norm, same in ranks.run(broken_step, flags, shapes, world_size=world_size):
        assert (applied, same) == (False, True)
        assert math.isnan(norm)
