"""What a GPU has to have for a precision, and what the word sets."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_trinity.arguments.precision import (
    PRECISIONS,
    derive_precision,
    precision_notes,
    refuse_precision_of_machine,
    tune_precision,
)
from megatron_trinity.errors import UsageError

AMPERE, ADA, HOPPER, BLACKWELL, SMALL_BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
CUDA = "13.0"


def arguments(precision: str | None, **given: object) -> Namespace:
    nothing = dict.fromkeys(
        (
            "fp8_margin",
            "fp8_amax_history_len",
            "fp8_amax_compute_algo",
            "num_layers_at_start_in_bf16",
            "num_layers_at_end_in_bf16",
            "fp8_recipe",
        )
    )
    plain = {"fp16": False, "bf16": False, "fp8": None}
    return Namespace(**{"precision": precision, **nothing, **plain, **given})


@pytest.mark.parametrize(
    ("precision", "works", "instead"),
    [
        ("bf16", (AMPERE, ADA, HOPPER, BLACKWELL, SMALL_BLACKWELL), {}),
        (None, (AMPERE, ADA, HOPPER, BLACKWELL, SMALL_BLACKWELL), {}),
        ("fp8-tensorwise", (ADA, HOPPER, BLACKWELL, SMALL_BLACKWELL), {AMPERE: "bf16"}),
        ("fp8-delayed", (ADA, HOPPER, BLACKWELL, SMALL_BLACKWELL), {AMPERE: "bf16"}),
        (
            "fp8-blockwise",
            (HOPPER, BLACKWELL, SMALL_BLACKWELL),
            {AMPERE: "bf16", ADA: "fp8-tensorwise"},
        ),
        (
            "fp8-mxfp8",
            (BLACKWELL,),
            {
                AMPERE: "bf16",
                ADA: "fp8-tensorwise",
                HOPPER: "fp8-blockwise",
                SMALL_BLACKWELL: "fp8-blockwise",
            },
        ),
    ],
)
def test_a_gpu_that_lacks_it_is_told_what_it_has(
    precision: str | None,
    works: tuple[tuple[int, int], ...],
    instead: dict[tuple[int, int], str],
) -> None:
    args = arguments(precision)
    for capability in works:
        refuse_precision_of_machine(args, capability, CUDA)
    for capability, other in instead.items():
        has = ".".join(map(str, capability))
        with pytest.raises(UsageError) as refused:
            refuse_precision_of_machine(args, capability, CUDA)
        message = str(refused.value)
        assert message.startswith(f"--precision {precision} needs a GPU of compute capability")
        assert message.endswith(f"this one has {has}; use {other}")
        assert "\n" not in message
    assert len(works) + len(instead) == 5


def test_blockwise_needs_a_late_cuda() -> None:
    args = arguments("fp8-blockwise")
    refuse_precision_of_machine(args, HOPPER, "12.9")
    with pytest.raises(UsageError, match=r"needs CUDA 12.9 or later, and .* for 12.8; use fp8-ten"):
        refuse_precision_of_machine(args, HOPPER, "12.8")
    refuse_precision_of_machine(arguments("fp8-tensorwise"), HOPPER, "12.8")


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (None, (False, None, "delayed", 1, "most_recent")),
        ("bf16", (True, None, "delayed", 1, "most_recent")),
        ("fp8-tensorwise", (True, "hybrid", "tensorwise", 1, "most_recent")),
        ("fp8-blockwise", (True, "e4m3", "blockwise", 1, "most_recent")),
        ("fp8-delayed", (True, "hybrid", "delayed", 1024, "max")),
        ("fp8-mxfp8", (True, "e4m3", "mxfp8", 1, "most_recent")),
    ],
)
def test_what_a_word_sets(precision: str | None, expected: tuple[object, ...]) -> None:
    args = arguments(precision)
    derive_precision(args)
    tune_precision(args)
    got = args.bf16, args.fp8, args.fp8_recipe, args.fp8_amax_history_len
    assert (*got, args.fp8_amax_compute_algo) == expected
    assert (args.fp8_margin, args.num_layers_at_start_in_bf16) == (0, 1)


def test_what_is_given_stays() -> None:
    args = arguments("fp8-delayed", fp8_margin=2, fp8_amax_history_len=7, bf16=True)
    derive_precision(args)
    tune_precision(args)
    assert (args.fp8_margin, args.fp8_amax_history_len, args.fp8_amax_compute_algo) == (2, 7, "max")


def test_two_precisions_are_one_too_many() -> None:
    for precision in PRECISIONS:
        with pytest.raises(UsageError, match=f"--fp16 and --precision {precision} are two"):
            derive_precision(arguments(precision, fp16=True))


def test_scales_that_no_checkpoint_has_are_told() -> None:
    nothing: dict[str, object] = {"save": None, "load": None}
    told = [
        list(precision_notes(arguments(precision, **{**nothing, **given})))
        for precision in ("fp8-delayed", "fp8-blockwise")
        for given in ({}, {"save": "run"}, {"load": "run"})
    ]
    assert [len(lines) for lines in told] == [0, 1, 1, 0, 0, 0]
    assert told[1] == told[2]
    assert "\n" not in told[1][0]
