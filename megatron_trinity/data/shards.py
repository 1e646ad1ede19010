"""Shards of a preparation on several machines, and their merge into what one machine would make.

A shard is a directory `<output>.shard-I-of-N` with ids and lengths of each split and a manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from megatron_trinity.data import manifest
from megatron_trinity.data.documents import SkipReport, Split
from megatron_trinity.data.token_files import (
    Written,
    dataset_files,
    describe_split,
    publish_datasets,
    refuse_empty,
    write_index,
)
from megatron_trinity.data.token_model import token_dtype
from megatron_trinity.errors import TrinityError, UsageError

if TYPE_CHECKING:
    from megatron_trinity.data.listing import SourceFile, Survey

_MANIFEST = "shard.json"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Shard:
    """Number `number` of `count`, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `I/N`.

        Raises:
            UsageError: it is not that, or I is not in 1 to N.
        """
        first, slash, last = text.partition("/")
        if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise UsageError(f"--shard {text}: give I/N, with I from 1 to N")
        return cls(int(first), int(last))

    def directory(self, output: Path) -> Path:
        """Where this shard of `output` is put."""
        return Path(f"{output}.shard-{self.number}-of-{self.count}")

    def of(self, files: Iterator[SourceFile], surveyed: Survey) -> Iterator[SourceFile]:
        """Those of `files` that fall to this shard: neighbours, and about as many bytes."""
        before = 0
        for number, file in enumerate(files):
            middle = before + file.size / 2
            # A file counts as a byte more, for sources of empty ones.
            share = (middle + number + 0.5) / (surveyed.bytes + surveyed.files)
            if int(share * self.count) == self.number - 1:
                yield file
            before += file.size


def publish_shard(work: Path, target: Path, made: dict[str, Any]) -> None:
    """Turn the directory of work into a shard's."""
    wanted = {f"{split}{suffix}" for split in made["splits"] for suffix in (".bin", ".lengths")}
    (work / _MANIFEST).write_text(json.dumps(made, indent=2, allow_nan=False) + "\n")
    for entry in work.iterdir():
        if entry.name not in wanted | {_MANIFEST}:
            entry.unlink()
        else:
            manifest.flush_to_disk(entry)
    if target.exists():
        shutil.rmtree(target)
    os.rename(work, target)
    manifest.flush_to_disk(target.parent)


def read_shard(directory: Path) -> dict[str, Any]:
    """The manifest of a shard.

    Raises:
        TrinityError: it is no shard, or its files are not as large as it says.
    """
    made = manifest.read_manifest(directory / _MANIFEST)
    if made is None:
        raise TrinityError(f"{directory} is no whole shard: make it again")
    for split, said in made["splits"].items():
        itemsize = np.dtype(said["dtype"]).itemsize
        for suffix, size in (
            (".bin", said["tokens"] * itemsize),
            (".lengths", 4 * said["documents"]),
        ):
            path = directory / f"{split}{suffix}"
            found = path.stat().st_size if path.exists() else -1
            if found != size:
                raise TrinityError(
                    f"{path} is not whole ({found} bytes of {size}): make this shard again, with "
                    "--overwrite"
                )
    return made


def find_shards(output: Path) -> list[Path]:
    """The shards of `output`, from the first to the last.

    Raises:
        TrinityError: there is none, one is missing, or there are those of several divisions.
    """
    found = sorted(output.parent.glob(f"{output.name}.shard-*-of-*"))
    if not found:
        raise TrinityError(f"no shards of {output}: make them with prepare_data.py --shard I/N")
    counts = {path.name.rpartition("-")[2] for path in found}
    if len(counts) > 1:
        raise TrinityError(
            f"shards of {output} are of {' and of '.join(sorted(counts))}: remove those not meant"
        )
    count = int(counts.pop())
    shards = [Shard(number, count).directory(output) for number in range(1, count + 1)]
    missing = [str(path) for path in shards if path not in found]
    if missing:
        raise TrinityError(f"{missing[0]} is missing, of {count} shards ({len(missing)} in all)")
    return shards


def merge_shards(output: Path, overwrite: bool = False) -> dict[str, Any]:
    """Merge the shards of `output`; return the manifest.

    Every file of a shard is compared with the SHA-256 that its manifest has.

    Raises:
        TrinityError: shards are missing, damaged or of different requests, or the output exists.
    """
    shards = find_shards(output)
    made = [read_shard(path) for path in shards]
    for path, other in zip(shards, made, strict=True):
        for key in ("request", "tokenizer"):
            if other[key] != made[0][key]:
                names = [k for k, v in other[key].items() if made[0][key].get(k) != v]
                raise TrinityError(
                    f"{path} was made from another request than {shards[0]} "
                    f"({', '.join(names)}): make it again"
                )
    splits: Sequence[Split] = list(made[0]["splits"])
    if not overwrite:
        files = [*dataset_files(output).values(), Path(f"{output}.json")]
        manifest.refuse_existing(files, "would be replaced")
    report = SkipReport()
    for shard in made:
        report.extend(SkipReport.from_dict(shard["skipped"]))
    try:
        with manifest.staging_directory(output.parent, f"{output.name}.merge") as staging:
            vocab_size = made[0]["tokenizer"]["vocab_size"]
            merged: dict[str, Any] = {
                "format": 1,
                "request": made[0]["request"],
                "tokenizer": made[0]["tokenizer"],
                "splits": {
                    split: _merge_split(split, shards, made, staging, vocab_size)
                    for split in splits
                },
                "skipped": report.as_dict(),
            }
            asked = merged["request"]
            refuse_empty(merged["splits"], tuple(asked["sources"]), asked["valid_fraction"], report)
            publish_datasets(staging, output, merged)
    except OSError as error:
        raise TrinityError(f"cannot write {output}: {error.strerror or error}") from error
    return merged


def _merge_split(
    split: Split,
    shards: Sequence[Path],
    made: Sequence[dict[str, Any]],
    staging: Path,
    vocab_size: int,
) -> dict[str, Any]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    dtype = token_dtype(vocab_size)
    whole = hashlib.sha256()
    with (
        open(staging / f"{split}.bin", "wb") as ids,
        open(staging / f"{split}.lengths", "wb") as out,
    ):
        for path, shard in zip(shards, made, strict=True):
            said = shard["splits"][split]
            for block in _verified(path / f"{split}.bin", said["sha256"]):
                ids.write(block)
                whole.update(block)
                counts += np.bincount(np.frombuffer(block, dtype=dtype), minlength=vocab_size)
            _copy(path / f"{split}.lengths", said["lengths_sha256"], out)
    write_index(staging / f"{split}.lengths", staging / f"{split}.idx", dtype)
    totals = [
        sum(shard["splits"][split][key] for shard in made)
        for key in ("documents", "tokens", "bytes")
    ]
    return describe_split(Written(*totals), counts, whole.hexdigest())


def _copy(path: Path, sha256: str, out: IO[bytes]) -> None:
    for block in _verified(path, sha256):
        out.write(block)


def _verified(path: Path, sha256: str) -> Iterator[bytes]:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            yield block
    if digest.hexdigest() != sha256:
        raise TrinityError(f"{path} is not what its shard's manifest says: make this shard again")
