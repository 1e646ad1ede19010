"""Whether a run that goes on reads what it has read so far."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_trinity.data.corpus import Part
from megatron_trinity.data.description import Description, Source
from megatron_trinity.errors import TrinityError

_CHUNK = 4096
_CHUNKS = 16
"""Places of each file that are read: whatever its size, it costs some milliseconds."""

Fingerprint = dict[str, Any]
"""JSON; a checkpoint keeps it with its arguments."""


def fingerprint_of(
    description: Description, seed: int, tokenizer_sha256: str | None
) -> Fingerprint:
    """What decides the tokens and their order: data, tokenizer, phases and seed.

    Paths do not count, so data may be moved; nor does when the last phase ends.
    """
    last = len(description.phases) - 1
    numbers = {source.name: number for number, source in enumerate(description.sources)}
    return {
        "seed": seed,
        "tokenizer": tokenizer_sha256,
        "sources": [
            {"name": source.name, "content": _contents(source)} for source in description.sources
        ],
        "phases": [
            {
                "tokens": phase.tokens if number < last else None,
                "blend": {str(numbers[name]): w for name, w in (phase.weights or {}).items()},
                "packing": [phase.packing, dict(phase.options)],
            }
            for number, phase in enumerate(description.phases)
        ],
    }


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """What is not alike in two fingerprints, in words, or None."""
    if there["seed"] != here["seed"]:
        return f"--seed is {there['seed']} there and {here['seed']} here"
    tokenizers = (there["tokenizer"], here["tokenizer"])
    if None not in tokenizers and tokenizers[0] != tokenizers[1]:
        return "its data were tokenised with another tokenizer, by their SHA-256"
    old, new = there["sources"], here["sources"]
    if len(old) != len(new):
        return f"it has read {len(old)} sources, and this run has {len(new)}"
    for before, now in zip(old, new, strict=True):
        if before["content"] != now["content"]:
            return f"the data of {now['name']} have changed (there: {before['name']})"
    for number, (before, now) in enumerate(zip(there["phases"], here["phases"], strict=False), 1):
        for key in ("blend", "packing", "tokens"):
            if before[key] != now[key]:
                return f"phase {number} has another {key}"
    return None


def _contents(source: Source) -> list[str]:
    bias = () if source.length_bias is None else (repr(source.length_bias),)
    return [*(_content(part) for part in source.parts), *bias]


def _content(part: Part) -> str:
    """Of sizes, and of places spread over both files."""
    digest = hashlib.sha256(repr((part.begin, part.end)).encode())
    for path in (Path(f"{part.prefix}.idx"), Path(f"{part.prefix}.bin")):
        try:
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with open(path, "rb") as stream:
                for place in _places(size):
                    digest.update(os.pread(stream.fileno(), _CHUNK, place))
        except OSError as error:
            raise TrinityError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()[:32]


def _places(size: int) -> Sequence[int]:
    if size <= _CHUNK * _CHUNKS:
        return range(0, size, _CHUNK)
    return [(size - _CHUNK) * number // (_CHUNKS - 1) for number in range(_CHUNKS)]
