"""The data that a command line names, checked before anything is built."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0

from megatron_trinity.data.indexed import check_indexed_dataset
from megatron_trinity.data.manifest import read_manifest, sha256_of_file
from megatron_trinity.errors import TrinityError, UsageError

SPLITS = ("train", "valid", "test")


def check_data(args: Namespace) -> None:
    """Check the datasets that the command line names, and say which splits there are not.

    One rank of each node reads the indices for the others.

    Raises:
        UsageError: none is named, none to train on, or a split or a weight leaves one out.
        TrinityError: one is missing, truncated or corrupt, or there is no place for indices.
    """
    _check_cache(args)
    if args.mock_data:
        return
    if not data_prefixes(args):
        raise UsageError(
            "no data: give --train-data-path and --valid-data-path, or --data-path with --split, "
            "as tools/prepare_data.py writes them"
        )
    _check_weights(args)
    splits = given_splits(args)
    if "train" not in splits and not args.skip_train:
        raise UsageError("no training data: give --train-data-path, or a --split that has some")
    if "valid" not in splits and args.eval_iters:
        print_rank_0(
            "WARNING: no validation data (--valid-data-path, or a share of --split): the run does "
            "not evaluate"
        )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for prefix in data_prefixes(args):
            _check_shares(args, prefix, check_indexed_dataset(prefix).sequences)


def check_manifests(args: Namespace) -> None:
    """Refuse datasets that were made with another tokenizer, or for a larger model.

    Both stand in the manifest that `tools/prepare_data.py` writes beside its datasets.

    Raises:
        UsageError: a dataset has tokens that the model has no embedding for, or other ones.
    """
    tokenizer = _tokenizer_sha256(args)
    unknown: list[tuple[str, str]] = []
    for prefix in [] if args.mock_data else data_prefixes(args):
        base, _, split = prefix.rpartition("_")
        manifest = read_manifest(Path(f"{base}.json")) or {}
        largest = manifest.get("splits", {}).get(split, {}).get("max_token_id", 0)
        if largest >= args.vocab_size:
            raise UsageError(
                f"{prefix} has token {largest}, the model {args.vocab_size} tokens; prepare it "
                "with the tokenizer of this run"
            )
        made_with = manifest.get("request", {}).get("tokenizer_sha256")
        if made_with is None:
            unknown.append((prefix, "it has no manifest"))
        elif tokenizer is None:
            unknown.append((prefix, f"that is a {args.tokenizer_type} without tokenizer.json"))
        elif made_with != tokenizer:
            raise UsageError(
                f"{prefix} was made with another tokenizer than --tokenizer-model "
                f"{args.tokenizer_model}, by their SHA-256; give the one that it was made with, or "
                "prepare it with this one"
            )
    if unknown:
        (first, why), *others = unknown
        more = f" and {len(others)} more" if others else ""
        print_rank_0(
            f"WARNING: nothing says whether {first}{more} was made with the tokenizer of this "
            f"run: {why}"
        )


def data_prefixes(args: Namespace) -> list[str]:
    """Path prefixes of the indexed datasets that the command line names."""
    return [prefix for paths, _ in _blends(args).values() for prefix in paths]


def given_splits(args: Namespace) -> set[str]:
    """Which of `SPLITS` have data."""
    blends = _blends(args)
    return {name for name, _ in _shares(args)} if "" in blends else set(blends)


def _blends(args: Namespace) -> dict[str, Any]:
    """Split to prefixes and their weights or None; the split is "" where `--split` divides them."""
    blend, per_split = get_blend_and_blend_per_split(args)
    if blend:
        return {"": blend}
    named = zip(SPLITS, per_split or [None] * len(SPLITS), strict=True)
    return {name: of_split for name, of_split in named if of_split}


def _shares(args: Namespace) -> Iterator[tuple[str, tuple[float, float]]]:
    """Splits that `--split` gives a share, and where it begins and ends, of 1."""
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    return ((name, share) for name, share in zip(SPLITS, matrix, strict=True) if share is not None)


def _check_weights(args: Namespace) -> None:
    for paths, weights in _blends(args).values():
        for path, weight in zip(paths, weights or [], strict=bool(weights)):
            if not 0 < weight < math.inf:
                raise UsageError(
                    f"{path} has a weight of {weight:g} in its blend; give one above 0, or leave "
                    "the dataset out"
                )


def _check_shares(args: Namespace, prefix: str, sequences: int) -> None:
    """Megatron looks for a sample in an empty share for ever."""
    for name, (start, end) in _shares(args) if "" in _blends(args) else ():
        if round(start * sequences) == round(end * sequences):
            raise UsageError(
                f"--split {args.split} leaves none of the {sequences} documents of {prefix} for "
                f"{name}; give it 0, or a larger share"
            )


def _check_cache(args: Namespace) -> None:
    """Megatron writes the order of the samples there, and fails on each rank for itself."""
    if args.data_cache_path is None:
        return
    cache = Path(args.data_cache_path)
    there = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise TrinityError(
            f"--data-cache-path {cache} cannot be written: {there} is not a writable directory"
        )


def _tokenizer_sha256(args: Namespace) -> str | None:
    """Of the file that prepares data in the same way, or None where there is no such file."""
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return None
    path = Path(args.tokenizer_model) / "tokenizer.json"
    return sha256_of_file(path) if path.is_file() else None
