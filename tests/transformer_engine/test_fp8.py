"""FP8 in a Trinity model: which products are in it, and what layouts and stops make of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import Layout, flags, ranks_of
from tests.distributed.pool import RankPools
from tests.trainer import (
    FULL_RECOMPUTE,
    checkpoint_contents,
    logged,
    run_trainer,
    training_flags,
    write_dataset,
)
from tests.transformer_engine.models import TE
from tests.trinity import afmoe_config, build, parse

MXFP8 = "fp8-mxfp8"
RECIPES = ("fp8-tensorwise", "fp8-blockwise", "fp8-delayed")
STATELESS = (*RECIPES[:2], MXFP8)
EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)


def formats_by_name(
    rank: int, world_size: int, more: Sequence[str]
) -> tuple[dict[str, set[tuple[str, ...]]], list[str]]:
    """Module to kind of product and formats of its factors, of a step; all modules with weights."""
    from megatron.core.transformer.module import Float16Module

    from tests.transformer_engine.emulation.products import products

    # Multiples of 32, as mxfp8 takes them.
    args = parse(afmoe_config(moe_intermediate_size=64), (*TE, *more))
    inner = build(args)
    model = Float16Module(inner.config, inner)
    found: dict[str, set[tuple[str, ...]]] = {}
    names = {module: name for name, module in inner.named_modules()}

    def collect(name: str) -> None:
        for made in products:
            words = (made.which, *(str(f).removeprefix("torch.") for f in made.formats))
            found.setdefault(name, set()).add(words)
        products.clear()

    products.clear()
    for module, name in names.items():
        if name and not list(module.children()):
            module.register_forward_hook(lambda m, i, o: collect(names[m]))
            module.register_full_backward_hook(lambda m, i, o: collect(names[m]))
    tokens = torch.randint(160, (2, 32), generator=torch.Generator().manual_seed(1))
    model(tokens, torch.arange(32).expand(2, 32), None).float().square().mean().backward()
    collect("outside of any")
    return found, sorted({name.rpartition(".")[0] for name, _ in inner.named_parameters()})


LINEAR = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.experts.linear_fc1",
    "mlp.experts.linear_fc2",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)


@pytest.mark.parametrize(
    ("recipe", "high"),
    [
        ("fp8-tensorwise", ()),
        ("fp8-blockwise", ()),
        ("fp8-delayed", ()),
        (MXFP8, ()),
        ("fp8-blockwise", (1, 2)),
    ],
)
def test_what_is_in_fp8_by_name(te_ranks: RankPools, recipe: str, high: tuple[int, ...]) -> None:
    """Every linear layer of attention, MLPs and experts, in all three products; nothing else."""
    more: tuple[str, ...] = ("--precision", recipe)
    if high:
        more += ("--first-last-layers-bf16", "--num-layers-at-start-in-bf16", str(high[0]))
        more += ("--num-layers-at-end-in-bf16", str(high[1]))
    [(found, weights)] = te_ranks.run(formats_by_name, more, world_size=1)
    layers = 5
    in_bf16 = {*range(high[0]), *range(layers - high[1], layers)} if high else set()
    e4m3 = "float8_e4m3fn"
    gradients = e4m3 if recipe in ("fp8-blockwise", MXFP8) else "float8_e5m2"
    expected: dict[str, set[tuple[str, ...]]] = {}
    others = set()
    for name in weights:
        layer = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if layer and layer[2] in LINEAR:
            low, of_gradients = (
                ("bfloat16", "bfloat16") if int(layer[1]) in in_bf16 else (e4m3, gradients)
            )
            expected[name] = {
                ("output", low, low),
                ("input", low, of_gradients),
                ("weight", low, of_gradients),
            }
        else:
            others.add(re.sub(r"^decoder\.layers\.\d+\.", "", name))
    assert others == {
        "embedding.word_embeddings",
        "decoder.final_layernorm",
        "output_layer",
        "input_layernorm",
        "pre_mlp_layernorm",
        "self_attn_bda.norm",
        "mlp_bda.norm",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "mlp.router",
    }
    assert len(expected) == 4 * layers + 2 * 4  # the first layer is dense, others are both
    for name, products in expected.items():
        assert found.pop(name, None) == products, name
    # What is left is the router's product, in bf16 or more.
    for name, products in found.items():
        assert not any("float8" in word for made in products for word in made), name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "data"
    write_dataset(path)
    return path


def train(
    ranks: RankPools, data: Path, run: Path, *more: str, world_size: int = 1
) -> dict[int, float]:
    """Step to loss, of every step that the runs into one folder have made."""
    argv = training_flags(
        data,
        *("--train-iters", "4", "--eval-iters", "0", "--adam-eps", "1e-4"),
        *("--ffn-hidden-size", "128", "--moe-ffn-hidden-size", "64"),
        *("--optimizer", "muon", "--use-distributed-optimizer"),
        *("--tensorboard-dir", str(run / "log")),
        *("--save", str(run), "--save-interval", "2"),
        *more,
    )
    # Emulated tiles are slow, and a busy machine makes them slower.
    codes = ranks.run(run_trainer, argv, world_size=world_size, timeout=400.0)
    assert codes == [0] * world_size
    return logged(run / "log", "lm loss")


def fp8(recipe: str) -> tuple[str, ...]:
    return (*TE, "--precision", recipe)


Reference = Callable[..., tuple[Path, dict[int, float]]]


@pytest.fixture(scope="module")
def alone(te_ranks: RankPools, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A recipe and further flags to the folder and the losses of one rank's run, made once."""

    @cache
    def run(recipe: str, *more: str) -> tuple[Path, dict[int, float]]:
        folder = tmp_path_factory.mktemp("alone")
        return folder, train(te_ranks, data, folder, *fp8(recipe), *more)

    return run


LAYOUTS: tuple[Layout, ...] = (("EP 2", "DP 2"), ("TP 2 + SP",), ("PP 2", "documents"))


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [*product(RECIPES, LAYOUTS), (MXFP8, ("TP 2 + SP",))],  # whose exchange has a way of its own
    ids=lambda value: value if isinstance(value, str) else " | ".join(value),
)
def test_a_layout_trains_as_one_rank(
    te_ranks: RankPools,
    data: Path,
    tmp_path: Path,
    alone: Reference,
    recipe: str,
    layout: Layout,
) -> None:
    """Not in the same digits: tensors that are scaled together depend on where they are cut."""
    _, one = alone(recipe, *flags(tuple(name for name in layout if name == "documents")))
    got = train(
        te_ranks,
        data,
        tmp_path / "got",
        *fp8(recipe),
        *flags(layout),
        world_size=ranks_of(layout),
    )
    assert got.keys() == one.keys() == {1, 2, 3, 4}
    for step, loss in one.items():
        assert got[step] == pytest.approx(loss, abs=0.02), step


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert got.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]


@pytest.mark.parametrize("recipe", STATELESS)
def test_a_resumed_run_is_the_same(
    te_ranks: RankPools, data: Path, tmp_path: Path, alone: Reference, recipe: str
) -> None:
    folder, whole = alone(recipe)
    parts = tmp_path / "parts"
    train(te_ranks, data, parts, *fp8(recipe), "--exit-interval", "2")
    resumed = train(te_ranks, data, parts, *fp8(recipe), "--load", str(parts))
    assert resumed == whole
    ends = [checkpoint_contents(path, 4) for path in (parts, folder)]
    assert equal(*ends) == []


def test_delayed_scales_start_anew(
    te_ranks: RankPools, data: Path, tmp_path: Path, alone: Reference
) -> None:
    """A checkpoint has none of them: a resumed run is near the one that was not stopped."""
    _, whole = alone("fp8-delayed")
    parts = tmp_path / "parts"
    first = train(te_ranks, data, parts, *fp8("fp8-delayed"), "--exit-interval", "2")
    assert first == {step: whole[step] for step in (1, 2)}
    resumed = train(te_ranks, data, parts, *fp8("fp8-delayed"), "--load", str(parts))
    assert resumed.keys() == whole.keys()
    for step, loss in whole.items():
        assert resumed[step] == pytest.approx(loss, abs=0.02), step


@pytest.mark.parametrize("way", ["to bf16", "to portable", "from bf16", "from portable"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_of_another_precision_loads(
    ranks: RankPools, te_ranks: RankPools, data: Path, tmp_path: Path, recipe: str, way: str
) -> None:
    """Weights and optimizer are those that were saved: without a learning rate they stay so."""
    other: tuple[RankPools, tuple[str, ...]] = (
        (te_ranks, (*TE, "--bf16")) if way.endswith("bf16") else (ranks, ("--bf16",))
    )
    pair: list[tuple[RankPools, tuple[str, ...]]] = [(te_ranks, fp8(recipe)), other]
    (first, of_first), (second, of_second) = pair if way.startswith("to") else pair[::-1]
    run = tmp_path / "run"
    train(first, data, run, *of_first, "--exit-interval", "2")
    saved = checkpoint_contents(run, 2)
    still = ("--override-opt_param-scheduler", "--lr", "0", "--adamw-lr", "0", "--min-lr", "0")
    more: dict[str, Any] = {"world_size": 1}
    train(second, data, run, *of_second, "--load", str(run), *still, **more)
    ended = checkpoint_contents(run, 4)
    weights = [name for name in saved if not re.match(r"optimizer|rng_state|.*expert_bias", name)]
    assert len(weights) > 10
    assert set(weights) <= ended.keys()
    for name in weights:
        assert torch.equal(saved[name], ended[name]), name


@pytest.mark.parametrize(
    "more",
    [
        FULL_RECOMPUTE,
        ("--recompute-granularity", "selective", "--recompute-modules", "layernorm", "moe"),
    ],
    ids=["full", "selective"],
)
def test_recompute(
    te_ranks: RankPools, data: Path, tmp_path: Path, alone: Reference, more: tuple[str, ...]
) -> None:
    recipe = "fp8-blockwise"
    _, plain = alone(recipe)
    assert train(te_ranks, data, tmp_path / "again", *fp8(recipe), *more) == plain
