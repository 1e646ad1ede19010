"""The precision of a run in one word, and what its products of matrices ask of sizes.

In FP8 the linear layers of Transformer Engine round both factors of each product (its output, the
gradient of its input and that of its weight) to eight bits. Weights, gradients and the optimizer's
state are as in bf16, and so is everything else: embedding, norms, router, core attention, LM head
and loss.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_trinity.arguments.refusal import Refusal
from megatron_trinity.errors import UsageError

BF16 = "bf16"


@dataclass(frozen=True)
class Precision:
    """What a word stands for.

    Attributes:
        why: the choice of formats, for the guide.
        sets: arguments of Megatron to their values.
        tunes: arguments that may be given beside it, to their values where they are not.
        multiple: what sizes of its products have to be multiples of.
        transformer_engine: the first version that has it.
        capability: the first compute capability that has it, and the first that has it no longer.
        cuda: the first version of CUDA that has it.
    """

    why: str
    sets: Mapping[str, Any]
    tunes: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1
    transformer_engine: tuple[int, int] | None = None
    capability: tuple[tuple[int, int], tuple[int, int] | None] = ((0, 0), None)
    cuda: tuple[int, int] = (0, 0)

    @property
    def eight_bits(self) -> bool:
        return "fp8" in self.sets


def _fp8(kind: str, recipe: str) -> dict[str, Any]:
    return {"bf16": True, "fp8": kind, "fp8_recipe": recipe}


ADA, HOPPER, BLACKWELL, SMALL_BLACKWELL = (8, 9), (9, 0), (10, 0), (12, 0)
_ENDS = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1}

PRECISIONS: dict[str, Precision] = {
    BF16: Precision("the range of fp32 in two bytes", {BF16: True}),
    "fp8-tensorwise": Precision(
        "hybrid: one scale has to hold a whole tensor, and gradients spread over more powers of "
        "two than e4m3 has",
        _fp8("hybrid", "tensorwise"),
        _ENDS,
        16,
        (2, 2),
        (ADA, None),
    ),
    "fp8-blockwise": Precision(
        "e4m3 for gradients as well: a scale for each 128 values (of a weight, each 128 x 128) "
        "makes up for its range, and its third bit of mantissa halves the error",
        _fp8("e4m3", "blockwise"),
        _ENDS,
        16,
        (2, 3),
        (HOPPER, None),
        (12, 9),
    ),
    "fp8-delayed": Precision(
        "hybrid, as tensorwise; the scale is of the largest value of the last 1024 micro-batches, "
        "since that of one alone is soon exceeded",
        _fp8("hybrid", "delayed"),
        {"fp8_margin": 0, "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
        16,
        (2, 1),
        (ADA, None),
    ),
    "fp8-mxfp8": Precision(
        "e4m3: a scale for each 32 values, in the GPU's own format",
        _fp8("e4m3", "mxfp8"),
        _ENDS,
        32,
        (2, 1),
        (BLACKWELL, SMALL_BLACKWELL),
    ),
}
FP8_WORDS = tuple(word for word, precision in PRECISIONS.items() if precision.eight_bits)
RECOMMENDED = "fp8-blockwise"

TUNING: dict[str, Any] = {
    "fp8_recipe": "delayed",
    "fp8_margin": 0,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}
"""Arguments that are None unless they are given, so that this is seen, to Megatron's defaults."""


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--precision`, and see which flags of Megatron are given beside it."""
    parser.add_argument_group(title="trinity").add_argument(
        "--precision",
        choices=list(PRECISIONS),
        help="of the products of matrices; FP8 needs Transformer Engine and an Ada, Hopper or "
        f"Blackwell GPU, on which {RECOMMENDED} is the first to try",
    )
    parser.set_defaults(**dict.fromkeys(TUNING))


def derive_precision(args: Namespace) -> None:
    """Set what the word stands for.

    Raises:
        UsageError: another format was asked for as well.
    """
    if args.precision is None:
        return
    if args.fp16:
        raise UsageError(f"--fp16 and --precision {args.precision} are two precisions; give one")
    vars(args).update(PRECISIONS[args.precision].sets)


def tune_precision(args: Namespace) -> None:
    """Fill in what may be given beside `--precision` and is not. To be called after refusals."""
    tunes = PRECISIONS[args.precision or BF16].tunes
    for name, standard in TUNING.items():
        if getattr(args, name) is None:
            setattr(args, name, tunes.get(name, standard))


def precision_notes(args: Namespace) -> Iterator[str]:
    """What of a run's precision is not in its checkpoints."""
    if args.precision == "fp8-delayed" and (args.save or args.load):
        yield (
            "precision: fp8-delayed saves no scales; a run that goes on from a checkpoint starts "
            "them anew, and its losses are near those of one that was not stopped, not the same"
        )


def refuse_precision_of_machine(
    args: Namespace, capability: tuple[int, int], cuda: str | None
) -> None:
    """Refuse what the GPU or its libraries cannot compute.

    Args:
        capability: the GPU's compute capability.
        cuda: the version that torch was built for.

    Raises:
        UsageError: names what is missing, and what to use instead.
    """
    precision = PRECISIONS[args.precision or BF16]
    first, beyond = precision.capability
    has = ".".join(map(str, capability))
    if capability < first or (beyond is not None and capability >= beyond):
        until = "" if beyond is None else f" and below {beyond[0]}.{beyond[1]}"
        instead = next(
            word
            for word in (RECOMMENDED, "fp8-tensorwise", BF16)
            if capability >= PRECISIONS[word].capability[0]
        )
        raise UsageError(
            f"--precision {args.precision} needs a GPU of compute capability "
            f"{first[0]}.{first[1]} or later{until}, and this one has {has}; use {instead}"
        )
    if cuda is not None and tuple(map(int, cuda.split(".")[:2])) < precision.cuda:
        raise UsageError(
            f"--precision {args.precision} needs CUDA {precision.cuda[0]}.{precision.cuda[1]} or "
            f"later, and torch was built for {cuda}; use fp8-tensorwise"
        )


def _in_fp8(args: Namespace) -> bool:
    return PRECISIONS[args.precision or BF16].eight_bits


def _given(*names: str) -> Callable[[Namespace], bool]:
    return lambda args: any(getattr(args, name) is not None for name in names)


_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_AT_ENDS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


def _too_many_at_ends(args: Namespace) -> bool:
    most = args.num_layers // args.pipeline_model_parallel_size
    counts = [getattr(args, name) for name in _AT_ENDS]
    return any(count is not None and not 0 <= count <= most for count in counts)


@dataclass(frozen=True)
class Size:
    """A size that products of matrices sum over or put side by side.

    Attributes:
        name: short and stable.
        of: the size on one rank.
        words: what it is made of, with flags in braces.
    """

    name: str
    of: Callable[[Namespace], int]
    words: str


def _expert_ranks(args: Namespace) -> int:
    return int(args.expert_tensor_parallel_size or args.tensor_model_parallel_size)


SIZES: tuple[Size, ...] = (
    Size("hidden size", lambda a: a.hidden_size, "{--hidden-size=}"),
    Size(
        "heads",
        lambda a: a.kv_channels * a.num_attention_heads // a.tensor_model_parallel_size,
        "{--kv-channels=} x {--num-attention-heads=} over {--tensor-model-parallel-size=}",
    ),
    Size(
        "queries, gates, keys and values",
        lambda a: (
            2
            * a.kv_channels
            * (a.num_attention_heads + a.num_query_groups)
            // a.tensor_model_parallel_size
        ),
        "2 x {--kv-channels=} x ({--num-attention-heads=} + {--num-query-groups=}) over "
        "{--tensor-model-parallel-size=}",
    ),
    Size(
        "dense layers",
        lambda a: a.ffn_hidden_size // a.tensor_model_parallel_size,
        "{--ffn-hidden-size=} over {--tensor-model-parallel-size=}",
    ),
    Size(
        "routed experts",
        lambda a: a.moe_ffn_hidden_size // _expert_ranks(a),
        "{--moe-ffn-hidden-size=} over the expert tensor parallel size",
    ),
    Size(
        "shared experts",
        lambda a: (a.moe_shared_expert_intermediate_size or 0) // a.tensor_model_parallel_size,
        "{--moe-ffn-hidden-size=} x {--num-shared-experts=} over {--tensor-model-parallel-size=}",
    ),
    Size(
        "tokens",
        lambda a: (
            a.micro_batch_size
            * a.seq_length
            // a.context_parallel_size
            // (a.tensor_model_parallel_size if a.sequence_parallel else 1)
        ),
        "{--micro-batch-size=} x {--seq-length=} over {--context-parallel-size=}, and with "
        "{--sequence-parallel} over {--tensor-model-parallel-size=}",
    ),
)
"""Of the products in FP8, the sizes on one rank. What tokens an expert gets is padded."""


def _does_not_tile(size: Size) -> Callable[[Namespace], bool]:
    return lambda a: _in_fp8(a) and size.of(a) % PRECISIONS[a.precision].multiple != 0


PRECISION_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "fp8-of-others",
        lambda a: _in_fp8(a) and a.transformer_impl == "local",
        "{--precision=}: the portable layers compute in bf16 or fp32, FP8 is of Transformer "
        "Engine's; use {--transformer-impl} transformer_engine, or {--precision} bf16",
    ),
    Refusal(
        "fp8-history",
        lambda a: _given(*_DELAYED)(a) and a.precision != "fp8-delayed",
        "{--fp8-margin}, {--fp8-amax-history-len} and {--fp8-amax-compute-algo} are of scales "
        "from past steps; leave them out, or use {--precision} fp8-delayed",
    ),
    Refusal(
        "layers-in-bf16",
        lambda a: a.first_last_layers_bf16 and not _in_fp8(a),
        "{--first-last-layers-bf16} changes nothing where all layers are; leave it out, or use "
        f"{{--precision}} {RECOMMENDED}",
    ),
    Refusal(
        "number-of-layers-in-bf16",
        lambda a: _given(*_AT_ENDS)(a) and not a.first_last_layers_bf16,
        "{--num-layers-at-start-in-bf16} and {--num-layers-at-end-in-bf16} are of "
        "{--first-last-layers-bf16}; give it, or leave them out",
    ),
    Refusal(
        "too-many-layers-in-bf16",
        lambda a: a.first_last_layers_bf16 and _too_many_at_ends(a),
        "{--num-layers-at-start-in-bf16} and {--num-layers-at-end-in-bf16} are from 0 to the "
        "number of layers of a pipeline stage; change them",
    ),
    Refusal(
        "delayed-layers-in-bf16",
        lambda a: a.precision == "fp8-delayed" and a.first_last_layers_bf16,
        "{--first-last-layers-bf16}: with {--precision=} all layers of a stage share a step of "
        f"their scales; leave it out, or use {RECOMMENDED}",
    ),
    Refusal(
        "delayed-recompute",
        lambda a: (
            a.precision == "fp8-delayed"
            and {"moe_act", "layernorm"} & set(a.recompute_modules or ())
        ),
        "{--recompute-modules} moe_act and layernorm: with {--precision=} a layer's input is "
        "rounded with the scale that it had; leave them out, or use " + RECOMMENDED,
    ),
    *(
        Refusal(
            f"fp8-{size.name.replace(',', '').replace(' ', '-')}",
            _does_not_tile(size),
            f"{size.name}: {size.words} is not a multiple of what {{--precision=}} multiplies at "
            "once, 16 values (32 with fp8-mxfp8); change it, or use {--precision} bf16",
        )
        for size in SIZES
    ),
)
