"""Matrices of an AfMoE directory in FP8: read from a checkpoint by bands and written.

Quantised are the linear layers of attention, MLPs and experts; `forms` says as what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_trinity.checkpoint.conversion.rows import Piece
from megatron_trinity.checkpoint.conversion.slices import Slice, not_finite, overlaps, slices
from megatron_trinity.checkpoint.conversion.tensor_bytes import write_from
from megatron_trinity.checkpoint.fp8.forms import Form
from megatron_trinity.checkpoint.fp8.quantize import dequantize, quantize
from megatron_trinity.checkpoint.hf.mapping import Entry
from megatron_trinity.checkpoint.hf.safetensors_files import FileLayout
from megatron_trinity.checkpoint.torch_dist.read import TorchDistTensors


@dataclass(frozen=True)
class Band:
    """Whole blocks of rows of a Hugging Face matrix, where they come from and where they go.

    Attributes:
        form: of the matrix.
        name: of the matrix.
        trinity: canonical name of the tensor that has its rows.
        sources: rows of that, in the order of the band.
        offset: of the values in the file.
        scale_offset: of the scales in the file.
        nbytes: of values and scales.
    """

    form: Form
    name: str
    trinity: str
    sources: tuple[Slice, ...]
    offset: int
    scale_offset: int
    nbytes: int


@dataclass(frozen=True)
class Quantized:
    """What became of a band, or of a matrix: sums of its bands.

    Attributes:
        nonfinite: values that are not finite.
        squared_error: sum over the squared differences of the source and what stands for it.
        squared_norm: sum over the squares of the source.
    """

    nonfinite: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    def __add__(self, other: Quantized) -> Quantized:
        return Quantized(
            self.nonfinite + other.nonfinite,
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
        )

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the difference over that of the source; 0 for zeros."""
        return float((self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0)


def bands(
    form: Form,
    entry: Entry,
    name: str,
    pieces: Iterable[Piece],
    layout: FileLayout,
    max_bytes: int,
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
    scale_row_bytes = form.scale_shape(shape)[1] * form.scale_dtype.itemsize
    for part in slices(shape, torch.float32.itemsize, max_bytes, multiple=form.rows):
        yield Band(
            form,
            name,
            entry.trinity,
            tuple(Slice(source.hf_row, source.rows) for source in overlaps(turned, part)),
            layout.offsets[name] + part.row * shape[1],
            layout.offsets[form.scale_name(name)] + part.row // form.rows * scale_row_bytes,
            part.rows * shape[1] + math.ceil(part.rows / form.rows) * scale_row_bytes,
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
    block = band.form.block(tuple(values.shape))
    fp8, scale = quantize(values, block, band.form.scale_dtype)
    write_from(descriptor, band.offset, fp8)
    write_from(descriptor, band.scale_offset, scale)
    difference = dequantize(fp8, scale, block).sub_(values)
    return Quantized(
        squared_error=_squared_norm(difference),
        squared_norm=_squared_norm(values),
    )


def _squared_norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())
