"""What one rank updates, and keeps the state of: parameters, or rows of them.

Data-parallel ranks hold the same parameters. Where they share the optimizer's state, a parameter is
as many units as there are ranks in whose shard of Megatron's buffers it has rows (`layout`). Else
it is one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_trinity.model.shards import local_row, parameter_parts
from megatron_trinity.optimizer.layout import item_of, rows_in_shards
from megatron_trinity.optimizer.matrices import Interval, Piece, pieces
from megatron_trinity.optimizer.param_groups import Group, group_of

STATE = "optimizer.state."
"""Prefix of the keys of the optimizer's tensors in a checkpoint, as Megatron's optimizers have."""
MASTER = "fp32_param"
UNASSIGNED = -1


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in its bucket.

    Attributes:
        start: elements from the start of the bucket.
        shard: elements of the bucket that each data-parallel rank has.
    """

    start: int
    shard: int


@dataclass
class Unit:
    """Rows of a parameter that are updated, and saved, together.

    Attributes:
        name: unique and independent of the layout but for the rows.
        group: what its members are updated by.
        parameter: the model's.
        rows: `[start, stop)` of the parameter.
        experts: whether it belongs to the experts' data-parallel group.
        parts: where its rows stand in canonical tensors.
        pieces: its matrices; empty for AdamW.
        owner: rank of the data-parallel group that updates it; UNASSIGNED until one is found. Where
            state is shared, the one in whose shard it lies.
        state: fp32 weights and moments, of the rows' shape, on ranks that keep them.
    """

    name: str
    group: Group
    parameter: nn.Parameter
    rows: Interval
    experts: bool
    parts: list[ShardedTensor]
    pieces: list[Piece]
    owner: int = UNASSIGNED
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def master(self) -> Tensor:
        """fp32 weights, of the rows' shape; the parameter itself if that is fp32.

        Raises: KeyError on a rank that does not keep the unit.
        """
        return self.state[MASTER]

    @property
    def weights(self) -> Tensor:
        """Its rows of the parameter, in the model's dtype."""
        return self.of(self.parameter.data)

    @property
    def gradient(self) -> Tensor:
        """Its rows of the gradient."""
        return self.of(gradient_of(self.parameter))

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows of a tensor of the parameter's shape."""
        start, stop = self.rows
        return tensor[start:stop]

    def keep(self, *moments: str) -> None:
        """Start to keep fp32 weights and moments, which are zero."""
        master = self.weights.float()
        self.state = {MASTER: master, **{name: torch.zeros_like(master) for name in moments}}

    def rows_of_piece(self, tensor: Tensor, piece: Piece) -> Tensor:
        """What a piece covers of a tensor of the unit's shape."""
        return tensor[piece.rows[0] - self.rows[0] : piece.rows[1] - self.rows[0]]

    def sharded(self, name: str, tensor: Tensor, replica: int) -> dict[str, ShardedTensor]:
        """The unit's `tensor` as parts of the canonical tensor of that `name`.

        Args:
            replica: number of this copy among those of the data-parallel ranks.
        """
        return {
            str(number): _part(part, STATE + name, self.rows_of(part, tensor), replica)
            for number, part in enumerate(self.parts)
        }

    def rows_of(self, part: ShardedTensor, tensor: Tensor) -> Tensor:
        """What `part` covers of a tensor of the unit's shape."""
        start = local_row(part.data, self.parameter) - self.rows[0]
        return tensor[start : start + part.local_shape[0]]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Where Megatron sums up the gradient of a parameter."""
    gradient: Tensor = getattr(parameter, "main_grad")  # noqa: B009 - set by Megatron
    return gradient


def _part(part: ShardedTensor, prefix: str, data: Tensor, replica: int) -> ShardedTensor:
    # Megatron saves cut tensors only if they have all axes of the whole one.
    leading = part.prepend_axis_num if part.axis_fragmentations is None else 0
    shape = (1,) * leading + tuple(data.shape)
    return replace(
        part,
        key=f"{prefix}.{part.key}",
        data=data.view(shape),
        dtype=data.dtype,
        local_shape=shape,
        prepend_axis_num=part.prepend_axis_num - leading,
        replica_id=(*part.replica_id[:-1], replica),
    )


def units_of(model: Sequence[MegatronModule], groups: Sequence[Group]) -> list[Unit]:
    """The parameters of this rank's model chunks as a unit each, in their order.

    Raises:
        TrinityError: a parameter is in no group or in two.
    """
    return [
        _unit(group, parameter, (0, parameter.shape[0]), parts, own)
        for group, parameter, parts, own in _held(model, groups)
    ]


def units_in_shards(
    model: Sequence[MegatronModule], groups: Sequence[Group], places: Mapping[nn.Parameter, Place]
) -> list[Unit]:
    """A unit for the rows of each parameter in each rank's shard.

    Raises:
        TrinityError: a parameter is in no group or in two.
    """
    units = []
    for group, parameter, parts, own in _held(model, groups):
        place = places[parameter]
        for rank, rows in rows_in_shards(place.start, item_of(parameter), place.shard):
            cut = [part for whole in parts for part in _cut(whole, parameter, rows)]
            within = [piece for whole in own for piece in whole.within(rows)]
            unit = _unit(group, parameter, rows, cut, within)
            unit.owner = rank
            units.append(unit)
    return units


def _held(
    model: Sequence[MegatronModule], groups: Sequence[Group]
) -> Iterator[tuple[Group, nn.Parameter, list[ShardedTensor], list[Piece]]]:
    """Every parameter, with its group, the canonical tensors and the matrices of Muon in it."""
    by_name = {group.name: group for group in groups}
    for chunk in model:
        for parameter, parts in parameter_parts(chunk):
            group = by_name[group_of(parts[0].key)]
            is_muon = group.kind == "muon"
            yield group, parameter, parts, pieces(parameter, parts, chunk.config) if is_muon else []


def _unit(
    group: Group,
    parameter: nn.Parameter,
    rows: Interval,
    parts: list[ShardedTensor],
    own: list[Piece],
) -> Unit:
    first = parts[0]
    offset = "".join(f"[{number}]" for number in first.global_offset[: first.prepend_axis_num])
    return Unit(
        name=f"{first.key}{offset} rows {rows[0]} to {rows[1]}",
        group=group,
        parameter=parameter,
        rows=rows,
        experts=not getattr(parameter, "allreduce", True),
        parts=parts,
        pieces=own,
    )


def _cut(part: ShardedTensor, parameter: nn.Parameter, rows: Interval) -> Iterator[ShardedTensor]:
    """What of a part lies in these rows of its parameter, if anything.

    Where it starts need not be a multiple of its size. What is whole says so too: Megatron wants
    that of all parts of a tensor or of none.
    """
    own = local_row(part.data, parameter)
    start, stop = max(rows[0], own), min(rows[1], own + part.local_shape[0])
    if start >= stop:
        return
    leading = part.prepend_axis_num
    offset = list(part.global_offset)
    offset[leading] += start - own
    yield replace(
        part,
        data=part.data[start - own : stop - own],
        local_shape=(stop - start, *part.local_shape[1:]),
        global_offset=tuple(offset),
        axis_fragmentations=None,
    )
