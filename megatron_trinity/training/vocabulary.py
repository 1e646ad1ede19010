"""The tokenizer and the size of the vocabulary, settled before the model is built."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.training import get_tokenizer

from megatron_trinity.errors import UsageError
from megatron_trinity.model.config import padded_vocab_size


def check_tokenizer_path(args: Namespace) -> None:
    """Refuse a tokenizer that is not there, before Megatron looks for it on a hub.

    Raises:
        UsageError: no tokenizer is named, or the named directory has none.
    """
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return
    if args.tokenizer_model is None:
        raise UsageError("no tokenizer: give --tokenizer-model DIR, or --tokenizer-type")
    if not (Path(args.tokenizer_model) / "tokenizer_config.json").is_file():
        raise UsageError(
            f"--tokenizer-model {args.tokenizer_model} holds no tokenizer; "
            "tools/train_tokenizer.py writes one"
        )


def settle_vocabulary(args: Namespace) -> None:
    """Set `vocab_size` (true) and `padded_vocab_size` (the model's), in place.

    The true size is `--vocab-size`, or the tokenizer's where that is not given. The model's is
    padded so that it divides over tensor-parallel ranks.

    Raises:
        UsageError: the tokenizer has more entries than the model.
    """
    entries = get_tokenizer().vocab_size
    if args.vocab_size is None:
        args.vocab_size = entries
    if entries > args.vocab_size:
        raise UsageError(
            f"the tokenizer has {entries} entries, the model {args.vocab_size}; "
            f"use --vocab-size {entries} or another tokenizer"
        )
    args.padded_vocab_size = padded_vocab_size(args)
