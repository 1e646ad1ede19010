"""Data: what of Megatron's ways to mask, pack and evaluate is refused."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from importlib.util import find_spec

from megatron_trinity.arguments.refusal import Refusal
from megatron_trinity.errors import UsageError

_SPLIT = re.compile(r"\s*\d*\.?\d+(\s*,\s*\d*\.?\d+){0,2}\s*")


def _is_split(text: str) -> bool:
    return _SPLIT.fullmatch(text) is not None and any(float(share) for share in text.split(","))


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    offer_dali(parser)
    group = parser.add_argument_group(title="trinity data")
    group.add_argument(
        "--data",
        metavar="FILE",
        help="a description of the data: sources, phases with their blends, validation sets "
        "(docs/data.md), in place of paths",
    )
    group.add_argument(
        "--packing",
        choices=("sequential", "in-order", "document-buffer", "best-fit", "greedy"),
        help="how documents become samples (docs/packing.md): sequential, where nothing is given; "
        "with --data, its phases say it",
    )
    group.add_argument(
        "--document-buffer-size",
        type=int,
        metavar="N",
        help="documents of each buffer of --packing document-buffer (1024); it holds up "
        "to twice as many",
    )
    group.add_argument(
        "--document-buffers",
        type=int,
        metavar="N",
        help="how many buffers --packing document-buffer has (4): 4 a GPU are the "
        "report's. Part of the order: the same for the whole run, whatever its layout",
    )
    group.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="go on from a checkpoint of a run that has read other data, or in another order",
    )


def offer_dali(parser: argparse.ArgumentParser) -> None:
    """Let `--dataloader-type` be dali as well."""
    for action in parser._actions:
        if action.dest == "dataloader_type":
            action.choices = [*(action.choices or ()), "dali"]
            action.help = "torch's loader (single, the default), or NVIDIA DALI (dali)"


def derive_data(args: Namespace) -> None:
    """Set `dali`; to Megatron its order is that of torch's loader.

    And `padded_rows`, which is so where the data are not known to be otherwise.

    Raises:
        UsageError: DALI is asked for and not installed.
    """
    args.padded_rows = False
    args.dali = args.dataloader_type == "dali"
    if not args.dali:
        return
    args.dataloader_type = "single"
    if args.mock_data:
        raise UsageError("--dataloader-type dali reads data, and --mock-data has none")
    if not dali_is_installed():
        raise UsageError(
            "--dataloader-type dali: NVIDIA DALI is not installed; leave it out, or "
            "pip install nvidia-dali-cuda130"
        )


def data_notes(args: Namespace) -> list[str]:
    """What a run is to say of its loaders, a line each."""
    if not args.dali or not args.num_workers:
        return []
    return [
        "NVIDIA DALI has no workers: it hands on the training data without them, and the "
        f"--num-workers {args.num_workers} are those of validation alone"
    ]


def dali_is_installed() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


SOURCES = (
    "data",
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)
"""Arguments that name data."""


def _sources(args: Namespace) -> int:
    """How many ways to name data are used; the paths of the splits are one."""
    given = {name for name in SOURCES if getattr(args, name) is not None}
    a_split = {"train_data_path", "valid_data_path", "test_data_path"}
    return len(given - a_split) + bool(given & a_split)


DATA_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "packing-sources",
        lambda a: a.packing is not None and (a.mock_data or a.data is not None),
        "{--packing} is of data paths: mock data are not packed, and the phases of {--data} say "
        "how each is; leave it out",
    ),
    Refusal(
        "document-buffer",
        lambda a: (
            a.packing != "document-buffer"
            and (a.document_buffer_size is not None or a.document_buffers is not None)
        ),
        "{--document-buffer-size} and {--document-buffers} are of {--packing} document-buffer; "
        "give it, or leave them out",
    ),
    Refusal(
        "packing-documents",
        lambda a: (
            a.packing not in (None, "sequential", "in-order")
            and not a.dataloader_inter_document_masking
        ),
        "{--packing=} puts pieces of documents side by side that do not belong together; give "
        "{--dataloader-inter-document-masking}, which keeps them apart",
    ),
    Refusal(
        "mock-data",
        lambda a: a.mock_data and _sources(a) > 0,
        "{--mock-data} beside data paths; leave one of them out",
    ),
    Refusal(
        "data-sources",
        lambda a: _sources(a) > 1,
        "data is named in more than one way; give {--data}, or {--train-data-path} and "
        "{--valid-data-path}, or {--data-path} with {--split}, or one of {--data-args-path} and "
        "{--per-split-data-args-path}",
    ),
    Refusal(
        "split",
        lambda a: a.split is not None and not _is_split(a.split),
        "{--split=}: give the shares of training, validation and test, as 98,2,0, not "
        "all of them 0",
    ),
    Refusal(
        "split-of-splits",
        lambda a: a.split is not None and a.data_path is None and a.data_args_path is None,
        "{--split} divides {--data-path}, which is not given; leave it out",
    ),
    Refusal(
        "cyclic",
        lambda a: a.dataloader_type == "cyclic",
        "{--dataloader-type=} deals the samples out to data-parallel ranks, so that their order "
        "depends on the layout; leave it out: samples are shuffled in any case",
    ),
    Refusal(
        "null-tokenizer",
        lambda a: a.tokenizer_type == "NullTokenizer" and a.vocab_size is None,
        "{--tokenizer-type} NullTokenizer has no vocabulary of its own; give {--vocab-size}",
    ),
    Refusal(
        "evaluation",
        lambda a: a.eval_interval < 1 or a.eval_iters < 0,
        "{--eval-interval} has to be 1 or more and {--eval-iters} 0 or more; use {--eval-iters} 0 "
        "for a run that does not evaluate",
    ),
    Refusal(
        "full-validation",
        lambda a: a.full_validation,
        "{--full-validation} fails in megatron-core 0.19.2 when there is one validation set; use "
        "{--eval-iters}",
    ),
    Refusal(
        "document-mask",
        lambda a: a.reset_attention_mask,
        "{--reset-attention-mask} makes a mask of every pair of tokens, which the core attention "
        "does not take; use {--dataloader-inter-document-masking}",
    ),
    Refusal(
        "document-positions",
        lambda a: a.reset_position_ids,
        "{--reset-position-ids} would change nothing: RoPE is relative; leave it out, and use "
        "{--dataloader-inter-document-masking} to keep documents apart",
    ),
    Refusal(
        "sft",
        lambda a: a.sft,
        "{--sft} packs conversations in a way that Trinity's batches do not know; leave it out",
    ),
    Refusal(
        "attention-mask",
        lambda a: a.create_attention_mask_in_dataloader,
        "the core attention takes no mask tensor; use {--no-create-attention-mask-in-dataloader}",
    ),
)
