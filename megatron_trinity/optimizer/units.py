"""What one rank updates, and keeps the state of: parameters, or rows of them.

Data-parallel ranks hold the same parameters. A parameter of Muon is one unit, since its matrices
have to be whole. A matrix of AdamW is cut into as many units as there are ranks, by rows, so that
the embedding's state is not the burden of one rank. Each unit has an owner among the ranks of its
data-parallel group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_trinity.model.shards import local_row, parameter_parts
from megatron_trinity.optimizer.matrices import Interval, Piece, pieces
from megatron_trinity.optimizer.param_groups import Group, group_of

STATE = "optimizer.state."
"""Prefix of the keys of the optimizer's tensors in a checkpoint, as Megatron's optimizers have."""
MASTER = "fp32_param"
UNASSIGNED = -1


@dataclass(frozen=True)
class DataParallel:
    """The ranks that hold the same parameters, as the optimizer sees them.

    Attributes:
        group: the ranks that share the work of an optimizer instance.
        size, rank: of that group.
        instance: number of this rank's instance.
        tensor: the tensor-parallel group of the same parameters.
    """

    group: ProcessGroup
    size: int
    rank: int
    instance: int
    tensor: ProcessGroup


def data_parallel(experts: bool, sharded: bool) -> DataParallel:
    """The groups of the experts' parameters, or of all others.

    Args:
        sharded: whether several optimizer instances may stand beside each other.
    """
    if experts:
        group = parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=sharded)
        whole = parallel_state.get_expert_data_parallel_group()
        tensor = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_data_parallel_group(
            with_context_parallel=True, partial_data_parallel=sharded
        )
        whole = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensor = parallel_state.get_tensor_model_parallel_group()
    return DataParallel(group, group.size(), group.rank(), whole.rank() // group.size(), tensor)


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
        owner: rank of the data-parallel group that updates it; UNASSIGNED until one is found.
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
    return replace(
        part,
        key=f"{prefix}.{part.key}",
        data=data,
        dtype=data.dtype,
        replica_id=(*part.replica_id[:-1], replica),
    )


def units_of(model: Sequence[MegatronModule], groups: Sequence[Group], ranks: int) -> list[Unit]:
    """The units of this rank's model chunks, in the order of their parameters.

    Args:
        ranks: how many units a matrix of AdamW is cut into; 1 leaves it whole.

    Raises:
        TrinityError: a parameter is in no group or in two.
    """
    by_name = {group.name: group for group in groups}
    units = []
    for chunk in model:
        for parameter, parts in parameter_parts(chunk):
            group = by_name[group_of(parts[0].key)]
            rows = parameter.shape[0]
            if group.kind == "muon":
                own = pieces(parameter, parts, chunk.config)
                units.append(_unit(group, parameter, (0, rows), parts, own))
            elif parameter.ndim == 1 or ranks == 1:
                units.append(_unit(group, parameter, (0, rows), parts, []))
            else:
                for rank in range(ranks):
                    cut = (rows * rank // ranks, rows * (rank + 1) // ranks)
                    if cut[0] < cut[1]:
                        unit = _unit(group, parameter, cut, [_cut(p, cut) for p in parts], [])
                        unit.owner = rank
                        units.append(unit)
    return units


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


def _cut(part: ShardedTensor, rows: Interval) -> ShardedTensor:
    """Rows of a part that is a whole parameter; where they start need not be a multiple of them."""
    start, stop = rows
    leading = part.prepend_axis_num
    offset = list(part.global_offset)
    offset[leading] += start
    return replace(
        part,
        data=part.data[start:stop],
        local_shape=(stop - start, *part.local_shape[1:]),
        global_offset=tuple(offset),
        axis_fragmentations=None,
    )
