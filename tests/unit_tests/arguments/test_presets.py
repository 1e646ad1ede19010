"""Presets: the published values, and that nothing in a preset is ignored or guessed."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_trinity.arguments.presets import apply_preset, load_preset, preset_names
from megatron_trinity.errors import UsageError
from tests.distributed.pool import RankPools

COMMON = {
    "kv_channels": 128,
    "vocab_size": 200192,
    "num_shared_experts": 1,
    "global_attn_every_n_layers": 4,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000,
    "mup_enabled": True,
    "bf16": True,
    "optimizer": "muon",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "clip_grad": 1.0,
    "lr_warmup_iters": 2000,
    "lr_decay_style": "WSD",
}
NAMES = (
    "num_layers",
    "num_dense_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "sliding_window",
    "seq_length",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_topk_scaling_factor",
    "max_position_embeddings",
    "global_batch_size",
    "lr",
    "min_lr",
    "lr_wsd_decay_style",
)
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "nano": (
        56, 2, 1024, 3072, 8, 2, 2048, 4096,
        128, 8, 256, 2.826, 131072, 4096, 1e-3, 0.0, "linear",
    ),
    "mini": (
        32, 2, 2048, 6144, 32, 4, 2048, 4096,
        128, 8, 1024, 2.826, 131072, 4096, 1e-3, 0.0, "linear",
    ),
    "large": (
        60, 6, 3072, 12288, 48, 8, 4096, 8192,
        256, 4, 3072, 2.448, 262144, 12288, 8e-4, 8e-5, "cosine",
    ),
}  # fmt: skip
SIGMA = {"nano": 0.016, "mini": 0.011, "large": 0.009}


def parse(rank: int, world_size: int, name: str, words: tuple[str, ...] = ()) -> Namespace:
    from megatron_trinity.arguments.parse import parse_arguments

    return parse_arguments(["--preset", name, "--train-iters", "9000", *words])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(ranks: RankPools, name: str) -> None:
    [args] = ranks.run(parse, name, world_size=1)
    expected = {**COMMON, **dict(zip(NAMES, PUBLISHED[name], strict=True))}
    assert {key: getattr(args, key) for key in expected} == expected
    assert round(args.init_method_std, 3) == SIGMA[name]


def test_tiny_has_everything_that_a_trinity_model_has(ranks: RankPools) -> None:
    [args] = ranks.run(parse, "tiny", world_size=1)
    assert 0 < args.num_dense_layers < args.num_layers
    assert args.global_attn_every_n_layers <= args.num_layers
    assert args.num_attention_heads > args.num_query_groups > 1
    assert args.sliding_window < args.seq_length
    assert args.num_shared_experts >= 1
    assert 1 < args.moe_router_topk < args.num_experts


def test_the_command_line_wins(ranks: RankPools) -> None:
    words = ("--num-layers", "8", "--lr", "0.5", "--sliding-window", "3")
    [args] = ranks.run(parse, "tiny", words, world_size=1)
    assert (args.num_layers, args.lr, args.sliding_window) == (8, 0.5, 3)
    assert args.hidden_size == 192


def test_names() -> None:
    assert preset_names() == ["large", "mini", "nano", "tiny"]


def parser() -> argparse.ArgumentParser:
    """A few flags of every kind that Megatron's parser has."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--num-layers", type=int)
    flags.add_argument("--lr", type=float)
    flags.add_argument("--optimizer", choices=["adam", "muon"], default="adam")
    flags.add_argument("--split")
    flags.add_argument("--bf16", action="store_true")
    flags.add_argument("--no-load-optim", action="store_true", default=None)
    flags.add_argument("--no-fusion", action="store_false", dest="fusion")
    flags.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--data-path", nargs="*")
    flags.add_argument("--rampup", nargs="+", type=int)
    flags.add_argument("--sliding-window", type=int)
    return flags


def apply(text: str, tmp_path: Path, words: tuple[str, ...] = ()) -> Namespace:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    flags = parser()
    apply_preset(flags, str(file), {"--sliding-window"})
    return flags.parse_args(words)


ALL_KINDS = """
trinity: {sliding-window: 5}
megatron:
  num-layers: 3
  lr: 8.0e-5
  optimizer: muon
  split: 99,1,0
  bf16: true
  no-fusion: true
  fast: false
  data-path: one
  rampup: [1, 2, 3]
"""


def test_every_kind_of_flag(tmp_path: Path) -> None:
    args = apply(ALL_KINDS, tmp_path)
    assert vars(args) == {
        "sliding_window": 5,
        "num_layers": 3,
        "lr": 8e-5,
        "optimizer": "muon",
        "split": "99,1,0",
        "bf16": True,
        "no_load_optim": None,
        "fusion": False,
        "fast": False,
        "data_path": ["one"],
        "rampup": [1, 2, 3],
    }


def test_a_preset_is_the_same_as_its_flags(tmp_path: Path) -> None:
    words = "--sliding-window 5 --num-layers 3 --lr 8e-5 --optimizer muon --split 99,1,0 --bf16"
    words += " --no-fusion --no-fast --data-path one --rampup 1 2 3"
    assert apply(ALL_KINDS, tmp_path) == parser().parse_args(words.split())


def test_flags_win_over_a_preset_of_ones_own(tmp_path: Path) -> None:
    words = ("--num-layers", "7", "--fast", "--rampup", "9")
    args = apply(ALL_KINDS, tmp_path, words)
    assert (args.num_layers, args.fast, args.rampup, args.sliding_window) == (7, True, [9], 5)


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    """YAML 1.1 reads `8e-5` as text; the flag's own type makes a number of it."""
    assert apply("megatron: {lr: 8e-5}", tmp_path).lr == 8e-5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("megatron: {num-layer: 3}", "megatron: num-layer is not a megatron flag"),
        ("megatron: {num_layers: 3}", "megatron: num_layers is not a megatron flag"),
        ("megatron: {sliding-window: 3}", "megatron: sliding-window is not a megatron flag"),
        ("trinity: {num-layers: 3}", "trinity: num-layers is not a trinity flag"),
        ("model: {num-layers: 3}", "unknown block model"),
        ("megatron: {num-layers: three}", "num-layers cannot be 'three'"),
        ("megatron: {num-layers: 3.5}", "num-layers cannot be 3.5"),
        ("megatron: {num-layers: true}", "num-layers cannot be True"),
        ("megatron: {num-layers: null}", "num-layers cannot be None"),
        ("megatron: {num-layers: [1, 2]}", "num-layers cannot be [1, 2]"),
        ("megatron: {split: {a: 1}}", "split cannot be {'a': 1}"),
        ("megatron: {optimizer: sgd}", "optimizer cannot be 'sgd'; choose from"),
        ("megatron: {bf16: false}", "bf16 is a switch; give true or leave it out"),
        ("megatron: {bf16: 1}", "bf16 is a switch"),
        ("megatron: {fast: 1}", "fast is a switch; give true or false"),
        ("megatron: {rampup: [1, x]}", "rampup cannot be [1, 'x']"),
        ("megatron: [num-layers]", "needs two blocks of flags"),
        ("- megatron", "needs two blocks of flags"),
        ("", "needs two blocks of flags"),
        ("megatron:\n  a: [1\n  b: 2\n", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_preset_is_told_in_one_line(
    text: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as wrong:
        apply(text, tmp_path)
    message = str(wrong.value)
    assert says in message
    assert "own.yaml" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["giant", "Tiny", "", "tiny.yaml", "no/such.yaml"])
def test_unknown_presets(name: str) -> None:
    with pytest.raises(UsageError) as wrong:
        load_preset(name)
    assert str(wrong.value).startswith(f"--preset {name}: no such preset; there are large, mini")
    assert "\n" not in str(wrong.value)


def test_one_block_is_enough(tmp_path: Path) -> None:
    assert apply("trinity: {sliding-window: 5}", tmp_path).sliding_window == 5
