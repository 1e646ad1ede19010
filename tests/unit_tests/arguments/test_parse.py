"""The command line: what Trinity's flags set in Megatron, what wins over what, what is refused."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import RankPools
from tests.paths import ROOT

TINY = ("--preset", "tiny", "--train-iters", "10")


def parse_each(
    rank: int, world_size: int, command_lines: list[tuple[str, ...]]
) -> list[Namespace | tuple[str, str]]:
    """The arguments, or class and message of the error, of each command line."""
    from megatron_trinity.arguments.parse import parse_arguments
    from megatron_trinity.errors import TrinityError

    results: list[Namespace | tuple[str, str]] = []
    for words in command_lines:
        before = list(sys.argv)
        try:
            results.append(parse_arguments(words))
        except TrinityError as error:
            results.append((type(error).__name__, str(error)))
        assert sys.argv == before
    return results


def parse(ranks: RankPools, *words: str, world_size: int = 1) -> Any:
    results = ranks.run(parse_each, [words], world_size=world_size)
    return results[0][0]


def usage_error(ranks: RankPools, *words: str, world_size: int = 1) -> str:
    result = parse(ranks, *words, world_size=world_size)
    assert isinstance(result, tuple), "it was accepted"
    kind, message = result
    assert kind == "UsageError"
    assert "\n" not in message
    return str(message)


@pytest.fixture(scope="module")
def tiny(ranks: RankPools) -> Any:
    return parse(ranks, *TINY)


def test_trinity_flags_set_megatrons(tiny: Any) -> None:
    assert tiny.sliding_window == 64
    assert tiny.window_size == (63, 0)
    assert tiny.window_attn_skip_freq == 4
    assert tiny.no_rope_freq == [0, 0, 0, 1]
    assert tiny.moe_layer_freq == [0, 1, 1, 1]
    assert tiny.moe_shared_expert_intermediate_size == 128
    assert tiny.init_method_std == pytest.approx(0.5 * 192**-0.5, rel=1e-12)
    assert tiny.weight_init_seed == tiny.seed == 1234


def test_trinity_flags_on_the_command_line(ranks: RankPools) -> None:
    args = parse(
        ranks,
        *TINY,
        *("--sliding-window", "1", "--global-attn-every-n-layers", "2", "--num-dense-layers", "0"),
        *("--num-shared-experts", "3", "--no-mup-enabled", "--seed", "7"),
    )
    assert args.window_size == (0, 0)
    assert args.window_attn_skip_freq == 2
    assert args.no_rope_freq == [0, 1, 0, 1]
    assert args.moe_layer_freq == [1, 1, 1, 1]
    assert args.moe_shared_expert_intermediate_size == 3 * 128
    assert args.mup_enabled is False
    assert args.weight_init_seed == 7
    without_shared = parse(ranks, *TINY, "--num-shared-experts", "0")
    assert without_shared.moe_shared_expert_intermediate_size is None


def test_a_trinity_model_by_default(tiny: Any) -> None:
    expected = {
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "attention_output_gate": True,
        "group_query_attention": True,
        "hidden_dropout": 0.0,
        "layernorm_epsilon": 1e-5,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",
        "moe_router_score_function": "sigmoid",
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "qk_layernorm": True,
        "rotary_base": 10000,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "create_attention_mask_in_dataloader": False,
        "moe_token_dispatcher_type": "alltoall",
        "mup_enabled": True,
        "transformer_impl": "local",
        # What a machine without CUDA needs, over Megatron's own defaults.
        "distributed_backend": "gloo",
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }
    assert {name: getattr(tiny, name) for name in expected} == expected


def test_what_wins_over_what(ranks: RankPools, tmp_path: Path) -> None:
    preset = tmp_path / "own.yaml"
    text = ROOT / "megatron_trinity/presets/tiny.yaml"
    preset.write_text(
        text.read_text() + "  norm-epsilon: 1.0e-6\n  distributed-timeout-minutes: 7\n"
    )
    own = ("--preset", str(preset), "--train-iters", "10")
    results = ranks.run(parse_each, [TINY, own, (*own, "--norm-epsilon", "1e-7")], world_size=1)[0]
    trinity, from_preset, from_command_line = results
    assert isinstance(trinity, Namespace)
    assert isinstance(from_preset, Namespace)
    assert isinstance(from_command_line, Namespace)
    assert trinity.layernorm_epsilon == 1e-5  # Trinity's, which happens to be Megatron's as well
    assert trinity.normalization == "RMSNorm"  # Trinity's over Megatron's LayerNorm
    assert from_preset.layernorm_epsilon == 1e-6
    assert from_command_line.layernorm_epsilon == 1e-7
    assert trinity.distributed_timeout_minutes != 7
    assert from_command_line.distributed_timeout_minutes == 7


def test_a_preset_wins_over_what_the_machine_needs(ranks: RankPools, tmp_path: Path) -> None:
    preset = tmp_path / "own.yaml"
    preset.write_text("megatron:\n  distributed-backend: nccl\n")
    message = usage_error(ranks, "--preset", str(preset), "--train-iters", "1")
    assert "--distributed-backend" in message
    assert "CUDA" in message


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--window-size", "3,0"), "--sliding-window"),
        (("--window-attn-skip-freq", "2"), "--global-attn-every-n-layers"),
        (("--no-rope-freq", "3"), "--global-attn-every-n-layers"),
        (("--moe-layer-freq", "2"), "--num-dense-layers"),
        (("--moe-layer-freq", "[1,1,1,1]"), "--num-dense-layers"),
        (("--moe-shared-expert-intermediate-size", "64"), "--num-shared-experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_megatrons_flags_that_follow_from_trinitys(
    ranks: RankPools, words: tuple[str, ...], says: str
) -> None:
    message = usage_error(ranks, *TINY, *words)
    assert message == f"{words[0]} follows from a Trinity flag; use {says}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--preset",), "--preset"),
        (("--preset", "giant"), "--preset giant: no such preset"),
        ((*TINY, "--no-such-flag", "3"), "--no-such-flag"),
        ((*TINY, "--num-layers", "four"), "--num-layers"),
        ((*TINY, "--sliding-window", "1.5"), "--sliding-window"),
        ((*TINY, "--sliding-window"), "--sliding-window"),
        (("--train-iters", "1"), "--preset"),
        ((*TINY, "--sliding-window", "0"), "--sliding-window 0"),
        ((*TINY, "--sliding-window", "-4"), "--sliding-window -4"),
        ((*TINY, "--global-attn-every-n-layers", "0"), "--global-attn-every-n-layers 0"),
        ((*TINY, "--num-dense-layers", "4"), "--num-dense-layers 4"),
        ((*TINY, "--num-dense-layers", "-1"), "--num-dense-layers -1"),
        ((*TINY, "--num-shared-experts", "-1"), "--num-shared-experts -1"),
        ((*TINY, "--moe-router-topk", "9"), "--moe-router-topk 9"),
        ((*TINY, "--tensor-model-parallel-size", "0"), "--tensor-model-parallel-size"),
        ((*TINY, "--tensor-model-parallel-size", "2"), "--tensor-model-parallel-size"),
        ((*TINY, "--expert-model-parallel-size", "2"), "--expert-model-parallel-size"),
        ((*TINY, "--micro-batch-size", "0"), "--micro-batch-size"),
        ((*TINY, "--global-batch-size", "12"), "--global-batch-size 12"),
        ((*TINY, "--bf16", "--fp16"), "bf16"),
        ((*TINY, "--no-bf16"), "unrecognized arguments: --no-bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_told_in_one_line(ranks: RankPools, words: tuple[str, ...], says: str) -> None:
    assert says in usage_error(ranks, *words)


SIZES = {
    "--num-layers": "4",
    "--hidden-size": "64",
    "--ffn-hidden-size": "96",
    "--num-attention-heads": "4",
    "--num-query-groups": "2",
    "--num-experts": "4",
    "--moe-ffn-hidden-size": "32",
    "--sliding-window": "8",
    "--vocab-size": "160",
    "--seq-length": "16",
    "--max-position-embeddings": "16",
    "--micro-batch-size": "1",
    "--global-batch-size": "1",
    "--train-iters": "1",
    "--lr": "1e-3",
}


def without(flag: str) -> tuple[str, ...]:
    return tuple(word for pair in SIZES.items() if pair[0] != flag for word in pair)


def test_a_model_without_a_preset(ranks: RankPools) -> None:
    args = parse(ranks, *without(""))
    assert isinstance(args, Namespace)
    assert args.window_size == (7, 0)
    assert args.num_dense_layers == 0


@pytest.mark.parametrize(
    "flag",
    [
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--num-experts",
        "--sliding-window",
        "--seq-length",
        "--max-position-embeddings",
        "--micro-batch-size",
    ],
)
def test_what_is_missing_is_told_in_one_line(ranks: RankPools, flag: str) -> None:
    assert flag.strip("-").replace("-", "_") in usage_error(ranks, *without(flag)).replace("-", "_")


def help_text(rank: int, world_size: int) -> tuple[int | str | None, str]:
    from megatron_trinity.arguments.parse import parse_arguments

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        parse_arguments(["--help"])
    return left.value.code, out.getvalue()


def test_help_lists_trinitys_flags_and_an_example(ranks: RankPools) -> None:
    [(code, text)] = ranks.run(help_text, world_size=1)
    assert code == 0
    assert "torchrun --nproc-per-node 2 pretrain_trinity.py --preset tiny" in text
    for flag in ("--preset", "--sliding-window", "--num-dense-layers", "--num-shared-experts"):
        assert f"\n  {flag} " in text
    assert "large, mini, nano, tiny" in text


def test_words_default_to_those_of_the_process(ranks: RankPools) -> None:
    [args] = ranks.run(parse_the_process, world_size=1)
    assert args.num_layers == 4


def parse_the_process(rank: int, world_size: int) -> Namespace:
    from megatron_trinity.arguments.parse import parse_arguments

    saved = sys.argv
    sys.argv = ["pretrain_trinity.py", *TINY]
    try:
        return parse_arguments()
    finally:
        sys.argv = saved


def test_flags_and_refusals_do_not_load_megatron_core() -> None:
    """It takes longer than all the rest of a command's start, and has to be adapted first."""
    program = "import sys, megatron_trinity.arguments.parse; print('megatron.core' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
