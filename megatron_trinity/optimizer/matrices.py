"""Which matrices of the Hugging Face layout stand in a parameter, and where.

Megatron fuses queries, gate, keys and values into one tensor, and gate and up projections into
another. Muon treats them as the separate matrices that they are. Where they stand follows from the
canonical name of a tensor and from a rank's part of it (`megatron_trinity.model.shards`), never
from shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_trinity.errors import TrinityError
from megatron_trinity.model.shards import local_row

Interval = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """One matrix inside a fused tensor.

    Attributes:
        name: what it is: `query`, `up`; empty if the tensor is one matrix.
        intervals: its rows in the whole tensor, `[start, stop)`, in the order of the matrix.
    """

    name: str
    intervals: tuple[Interval, ...]

    @property
    def rows(self) -> int:
        return sum(stop - start for start, stop in self.intervals)


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter that are a rectangle of a matrix.

    Attributes:
        tensor, index: canonical tensor that the matrix is of, and number of an expert in it.
        part: which of the tensor's matrices it is.
        shape: of the whole matrix, (fan_out, fan_in).
        rows: `[start, stop)` in the parameter.
        row, column: where the rectangle starts in the matrix.
        columns: width of the rectangle.
    """

    tensor: str
    index: tuple[int, ...]
    part: str
    shape: tuple[int, int]
    rows: Interval
    row: int
    column: int
    columns: int

    @property
    def matrix(self) -> tuple[str, tuple[int, ...], str]:
        """Which matrix of the model it is."""
        return self.tensor, self.index, self.part

    def within(self, rows: Interval) -> Iterator[Piece]:
        """What of it lies in these rows of the parameter, if anything."""
        start, stop = max(rows[0], self.rows[0]), min(rows[1], self.rows[1])
        if start < stop:
            yield replace(self, rows=(start, stop), row=self.row + start - self.rows[0])


def parts(key: str, rows: int, config: TransformerConfig) -> list[Part]:
    """The matrices in a canonical tensor with that many rows.

    Raises:
        TrinityError: the rows are not those of the model's configuration.
    """
    if key.endswith(".linear_qkv.weight"):
        return _attention_parts(key, rows, config)
    if key.endswith(".linear_fc1.weight"):
        if not config.gated_linear_unit or rows % 2:
            raise TrinityError(f"{key} has {rows} rows, which are no gate and up projection")
        return [Part("gate", ((0, rows // 2),)), Part("up", ((rows // 2, rows),))]
    return [Part("", ((0, rows),))]


def _attention_parts(key: str, rows: int, config: TransformerConfig) -> list[Part]:
    groups, head = config.num_query_groups, config.kv_channels
    query = config.num_attention_heads // groups * head
    widths = {"query": query, "gate": query, "key": head, "value": head}
    of_group = sum(widths.values())
    if not config.attention_output_gate or rows != groups * of_group:
        raise TrinityError(
            f"{key} has {rows} rows; {groups} query groups of query, gate, key and value have "
            f"{groups * of_group}"
        )
    found, start = [], 0
    for name, width in widths.items():
        starts = [group * of_group + start for group in range(groups)]
        found.append(Part(name, tuple((first, first + width) for first in starts)))
        start += width
    return found


def pieces(
    parameter: Tensor, held: Sequence[ShardedTensor], config: TransformerConfig
) -> list[Piece]:
    """What a parameter holds of which matrices.

    Args:
        parameter: `[rows, columns]` of this rank.
        held: the parts of canonical tensors that it is made of, views of it as their data.
    """
    return [piece for tensor in held for piece in _pieces_of(parameter, tensor, config)]


def _pieces_of(
    parameter: Tensor, tensor: ShardedTensor, config: TransformerConfig
) -> Iterator[Piece]:
    leading = tensor.prepend_axis_num
    rows, columns = tensor.global_shape[leading:]
    first, column = tensor.global_offset[leading:]
    height, width = tensor.local_shape
    own = local_row(tensor.data, parameter)
    for part in parts(tensor.key, rows, config):
        row = 0  # of the matrix
        for start, stop in part.intervals:
            low, high = max(start, first), min(stop, first + height)
            if low < high:
                yield Piece(
                    tensor=tensor.key,
                    index=tuple(tensor.global_offset[:leading]),
                    part=part.name,
                    shape=(part.rows, columns),
                    rows=(own + low - first, own + high - first),
                    row=row + low - start,
                    column=column,
                    columns=width,
                )
            row += stop - start
