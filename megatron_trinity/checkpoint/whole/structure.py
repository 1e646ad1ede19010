"""Whether the tensors of a checkpoint are all there, by its own account of what is where."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_trinity.checkpoint.iterations import CONFIG, METADATA
from megatron_trinity.checkpoint.torch_dist.read import TorchDistTensors
from megatron_trinity.checkpoint.whole.manifest import faults, read_manifest
from megatron_trinity.errors import TrinityError
from megatron_trinity.model.boxes import Box, cover


def manifest_faults(directory: Path, checksums: bool) -> Iterator[str]:
    """What of the directory of an iteration is not as its manifest says, a line each."""
    try:
        yield from faults(directory, read_manifest(directory), checksums)
    except TrinityError as error:
        yield str(error)


def structure_faults(stored: TorchDistTensors) -> Iterator[str]:
    """What `.metadata` says is there and is not, a line each; reads no values."""
    if not (stored.path / CONFIG).is_file():
        yield f"{CONFIG} is missing"
    ends: dict[str, int] = defaultdict(int)
    for place in stored.places.values():
        ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
    for name, end in sorted(ends.items()):
        yield from _file_faults(stored.path, name, end)
    for key in stored.tensor_keys():
        yield from _tensor_faults(stored, key)


def object_faults(stored: TorchDistTensors) -> Iterator[str]:
    """What is there and no reader takes for data, so that no training loads it; a line each."""
    for key in stored.object_keys():
        try:
            stored.object(key)
        except TrinityError as error:
            yield str(error).removeprefix(f"{stored.path}: ")


def _file_faults(directory: Path, name: str, end: int) -> Iterator[str]:
    if Path(name).name != name:
        yield f"{METADATA} names the file {name}, which is outside of the directory"
        return
    try:
        size = (directory / name).stat().st_size
    except FileNotFoundError:
        yield f"{name} is missing"
        return
    if size < end:
        yield f"{name} has {size} bytes, {METADATA} names values up to byte {end}"


def _tensor_faults(stored: TorchDistTensors, key: str) -> Iterator[str]:
    shape = stored.shape(key)
    boxes: Counter[Box] = Counter()
    for chunk in stored.chunks(key):
        start = tuple(chunk.offsets)
        stop = tuple(begin + size for begin, size in zip(start, chunk.sizes, strict=True))
        if MetadataIndex(key, chunk.offsets) not in stored.places:
            yield f"{key}: its chunk at {list(start)} is in no file"
            return
        if any(end > size for end, size in zip(stop, shape, strict=True)):
            yield f"{key}: its chunk at {list(start)} ends outside of its shape {list(shape)}"
            return
        boxes[Box(key, start, stop, shape)] += 1
    fewest, most = cover(boxes).get(key, (0, 0))
    if fewest == 0:
        yield f"{key}: its chunks do not cover the whole tensor of shape {list(shape)}"
    elif most > 1:
        yield f"{key}: its chunks overlap"
