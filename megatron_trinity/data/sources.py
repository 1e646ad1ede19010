"""The data that a command line names, checked before anything is built."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0

from megatron_trinity.data.corpus import Part
from megatron_trinity.data.description import (
    Description,
    EvaluationSet,
    PlannedPhase,
    Source,
    check_shares,
    read_description,
)
from megatron_trinity.data.indexed import IndexedDatasetInfo, check_indexed_dataset
from megatron_trinity.data.manifest import sha256_of_file, split_in_manifest
from megatron_trinity.data.packings import PACKINGS
from megatron_trinity.errors import UsageError

SPLITS = ("train", "valid", "test")


def check_data(args: Namespace) -> Description:
    """What the command line names; check its datasets, and say which splits there are not.

    One rank of each node reads the indices for the others. Mock data names nothing.

    Raises:
        UsageError: none is named, none to train on, or a split or a weight leaves one out.
        TrinityError: one is missing, truncated or corrupt.
    """
    if args.mock_data:
        return Description()
    described = describe(args)
    if not described.parts():
        raise UsageError(
            "no data: give --data, or --train-data-path and --valid-data-path, or --data-path with "
            "--split, as tools/prepare_data.py writes them"
        )
    if not described.sources and not args.skip_train:
        raise UsageError("no training data: give --train-data-path, or a --split that has some")
    _check_masking(args, described)
    if not described.validation and args.eval_iters:
        print_rank_0(
            "WARNING: no validation data (--valid-data-path, or a share of --split): the run does "
            "not evaluate"
        )
    if _reads_for_its_node():
        checked: dict[str, IndexedDatasetInfo] = {}
        for part in described.parts():
            if part.prefix not in checked:
                checked[part.prefix] = check_indexed_dataset(part.prefix)
            _check_share(args, part, checked[part.prefix])
    return described


def _reads_for_its_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _check_masking(args: Namespace, described: Description) -> None:
    for phase in described.phases:
        if PACKINGS[phase.packing].masking and not args.dataloader_inter_document_masking:
            raise UsageError(
                f"packing {phase.packing} puts pieces of documents side by side that do not belong "
                "together; give --dataloader-inter-document-masking, which keeps them apart"
            )


def check_manifests(args: Namespace, described: Description) -> None:
    """Refuse datasets that were made with another tokenizer, or for a larger model.

    Both stand in the manifest that `tools/prepare_data.py` writes beside its datasets. One rank of
    each node reads it for the others.

    Raises:
        UsageError: a dataset has tokens that the model has no embedding for, or other ones.
    """
    if not _reads_for_its_node():
        return
    tokenizer = tokenizer_sha256(args)
    unknown: list[tuple[str, str]] = []
    for prefix in dict.fromkeys(part.prefix for part in described.parts()):
        manifest, said = split_in_manifest(prefix)
        largest = said.get("max_token_id", 0)
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


def describe(args: Namespace) -> Description:
    """What the command line names: the file of `--data`, or Megatron's flags in the same form.

    Several paths without weights are weighted by their tokens.

    Raises:
        UsageError: the file is not a description; or a weight would leave a path out.
    """
    if args.data is not None:
        return read_description(args.data)
    blends = _blends(args)
    shares = dict.fromkeys(blends, (0.0, 1.0))
    if "" in blends:
        shares = dict(_shares(args))
    found = {}
    for name, share in shares.items():
        paths, of_paths = blends.get(name) or blends[""]
        found[name] = _sources(paths, of_paths, share)
    sources, weights = found.get("train", ((), None))
    by_name = None
    if weights is not None:
        by_name = {source.name: w for source, w in zip(sources, weights, strict=True)}
    evaluated = {
        name: (EvaluationSet("", *found[name]),) for name in ("valid", "test") if name in found
    }
    return Description(
        sources,
        (PlannedPhase(None, by_name, *_packing(args)),) if sources else (),
        evaluated.get("valid", ()),
        evaluated.get("test", ()),
    )


def _packing(args: Namespace) -> tuple[str, dict[str, int]]:
    """The packing that the flags name, and its options."""
    given = {"size": args.document_buffer_size, "buffers": args.document_buffers}
    options = {key: value for key, value in given.items() if value is not None}
    return args.packing or "sequential", options


def _sources(
    paths: Sequence[str], weights: Sequence[float] | None, share: tuple[float, float]
) -> tuple[tuple[Source, ...], tuple[float, ...] | None]:
    """A path that stands twice has the weight of both."""
    for path in paths:
        if _is_number(path) and not Path(f"{path}.idx").exists():
            raise UsageError(
                f"{path} is no path among the data, but a number; a weight stands in front of its "
                "path, and all paths have one or none: 0.7 a 0.3 b"
            )
    by_path: dict[str, float] = {}
    for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True):
        by_path[path] = by_path.get(path, 0.0) + weight
    if weights is not None:
        check_shares(dict(zip(paths, weights, strict=True)))
    sources = tuple(Source(path, (Part(path, *share),)) for path in by_path)
    return sources, None if weights is None else tuple(by_path.values())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _blends(args: Namespace) -> dict[str, Any]:
    """Split to prefixes and their weights or None; the split is "" where `--split` divides them."""
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (ValueError, AssertionError) as error:
        raise UsageError(
            "the paths of the data are neither paths alone nor pairs of a weight and a path "
            f"(0.7 a 0.3 b): {error}"
        ) from error
    if blend:
        return {"": blend}
    named = zip(SPLITS, per_split or [None] * len(SPLITS), strict=True)
    return {name: of_split for name, of_split in named if of_split}


def _shares(args: Namespace) -> Iterator[tuple[str, tuple[float, float]]]:
    """Splits that `--split` gives a share, and where it begins and ends, of 1."""
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    return ((name, share) for name, share in zip(SPLITS, matrix, strict=True) if share is not None)


def _check_share(args: Namespace, part: Part, info: IndexedDatasetInfo) -> None:
    if round(part.begin * info.sequences) == round(part.end * info.sequences):
        raise UsageError(
            f"--split {args.split} leaves none of the {info.sequences} documents of {part.prefix} "
            "for one of its shares; give it 0, or a larger one"
        )
    if info.tokens == 0:
        raise UsageError(f"{part.prefix} has no tokens: its documents are all empty")


def tokenizer_sha256(args: Namespace) -> str | None:
    """Of the file that prepares data in the same way, or None where there is no such file."""
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return None
    path = Path(args.tokenizer_model) / "tokenizer.json"
    return sha256_of_file(path) if path.is_file() else None
