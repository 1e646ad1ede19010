"""An AfMoE directory in FP8: which matrices, under which names, and how they are written.

The form is the one that transformers (`FineGrainedFP8Config`) and vLLM read: `NAME.weight` in e4m3
beside `NAME.weight_scale_inv`. Quantised are the linear layers of attention, MLPs and experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_trinity.checkpoint.fp8 import (
    BLOCK,
    dequantize_blocks,
    quantize_blocks,
    scale_shape,
)
from megatron_trinity.checkpoint.hf_mapping import Entry, Piece
from megatron_trinity.checkpoint.safetensors_files import FileLayout, write_from
from megatron_trinity.checkpoint.slices import Slice, not_finite, overlaps, slices
from megatron_trinity.checkpoint.torch_dist import TorchDistTensors
from megatron_trinity.errors import TrinityError


def is_quantized(entry: Entry) -> bool:
    """Whether a tensor of the table is made of matrices that FP8 is for."""
    return all(name.endswith("_proj.weight") for name in entry.hf)


def scale_name(name: str) -> str:
    """The name of the scales of a matrix."""
    return f"{name}_scale_inv"


def quantization_config(table: Iterable[Entry]) -> dict[str, Any]:
    """What `config.json` says of the form, with the modules whose matrices stay as they are."""
    kept = [
        name.removesuffix(".weight")
        for entry in table
        if not is_quantized(entry)
        for name, shape in entry.hf.items()
        if len(shape) > 1
    ]
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }


def refuse_partial_blocks(quantized: Iterable[Entry]) -> None:
    """Refuse matrices that are not whole blocks.

    vLLM refuses blocks that lie in two of the matrices that it merges (query, key and value; gate
    and up), and transformers takes the size of a block to be that of the matrix over the number of
    scales.

    Raises:
        TrinityError: there is one.
    """
    for entry in quantized:
        for name, shape in entry.hf.items():
            if any(size % BLOCK for size in shape):
                raise TrinityError(
                    f"{name} is {shape[0]} x {shape[1]}, and FP8 blocks need multiples of {BLOCK}; "
                    "export it without --fp8"
                )


@dataclass(frozen=True)
class Band:
    """Whole blocks of rows of a Hugging Face matrix, where they come from and where they go.

    Attributes:
        name: of the matrix.
        trinity: canonical name of the tensor that has its rows.
        sources: rows of that, in the order of the band.
        offset: of the values in the file.
        scale_offset: of the scales in the file.
    """

    name: str
    trinity: str
    sources: tuple[Slice, ...]
    offset: int
    scale_offset: int


@dataclass(frozen=True)
class Quantized:
    """What became of a band, or of a matrix: sums of its bands.

    Attributes:
        nonfinite: values that are not finite.
        nbytes: written.
        squared_error: sum over the squared differences of the source and what stands for it.
        squared_norm: sum over the squares of the source.
    """

    nonfinite: int = 0
    nbytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    def __add__(self, other: Quantized) -> Quantized:
        return Quantized(
            self.nonfinite + other.nonfinite,
            self.nbytes + other.nbytes,
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
        )

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the difference over that of the source; 0 for zeros."""
        return float((self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0)


def bands(
    entry: Entry, name: str, pieces: Iterable[Piece], layout: FileLayout, max_bytes: int
) -> Iterator[Band]:
    """Cut a matrix of `entry` into bands of at most `max_bytes` in fp32, but at least a block high.

    Args:
        name: of the matrix.
        pieces: all of `entry` that are of this matrix.
        layout: of the file that it goes into.
    """
    # Seen from the other side: rows of the matrix, and where they stand in the Trinity tensor.
    turned = sorted(
        (Piece(entry.trinity, piece.row, piece.hf_row, piece.rows) for piece in pieces),
        key=lambda piece: piece.row,
    )
    shape = entry.hf[name]
    scale_row_bytes = scale_shape(shape)[1] * torch.float32.itemsize
    for part in slices(shape, torch.float32.itemsize, max_bytes, multiple=BLOCK):
        yield Band(
            name,
            entry.trinity,
            tuple(Slice(source.hf_row, source.rows) for source in overlaps(turned, part)),
            layout.offsets[name] + part.row * shape[1],
            layout.offsets[scale_name(name)] + part.row // BLOCK * scale_row_bytes,
        )


def write_band(checkpoint: TorchDistTensors, band: Band, descriptor: int) -> Quantized:
    """Read a band, and write its values and scales into an open file.

    A band that is not finite has no scales and is not written.
    """
    values = torch.cat(
        [checkpoint.rows(band.trinity, part.row, part.rows) for part in band.sources]
    )
    bad = not_finite(values)
    if bad:
        return Quantized(nonfinite=bad)
    fp8, scale_inv = quantize_blocks(values)
    write_from(descriptor, band.offset, fp8)
    write_from(descriptor, band.scale_offset, scale_inv)
    difference = dequantize_blocks(fp8, scale_inv).sub_(values)
    return Quantized(
        nbytes=fp8.nbytes + scale_inv.nbytes,
        squared_error=_squared_norm(difference),
        squared_norm=_squared_norm(values),
    )


def _squared_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())
