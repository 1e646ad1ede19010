"""The optimizer's state of one rank, in the form that it has in Megatron's `torch` format.

Which tensors there are, and in which order, is asked of the optimizer itself, made for the model of
the rank on the meta device; where their values are in the whole checkpoint, of its sharded state.
Every rank of the format holds all state of its parameters, so the optimizer is not sharded.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

ReadPart = Callable[[ShardedTensor], Tensor]


def of_one_rank(args: Namespace) -> Namespace:
    """The arguments of a run, without sharding of the optimizer's state."""
    args = copy.copy(args)
    args.use_distributed_optimizer = args.use_layer_wise_distributed_optimizer = False
    args.num_distributed_optimizer_instances = 1
    return args


def optimizer_state(
    args: Namespace, chunks: Sequence[Any], steps: int, read: ReadPart
) -> dict[str, Any] | list[Any]:
    """What the optimizer's `state_dict` would give.

    Args:
        args: of the run, as `of_one_rank` gives them.
        chunks: the rank's model, on the meta device.
        steps: that the run had taken.
        read: gives the values of a part of a tensor.
    """
    if args.optimizer == "muon":
        return _of_trinity(args, chunks, steps, read)
    return _of_adam(args, chunks, steps, read)


def _of_trinity(
    args: Namespace, chunks: Sequence[Any], steps: int, read: ReadPart
) -> dict[str, Any]:
    from megatron_trinity.optimizer.optimizer import MOMENTS
    from megatron_trinity.optimizer.param_groups import groups_from_args
    from megatron_trinity.optimizer.units import units_of

    state = {}
    for unit in units_of(chunks, groups_from_args(args)):
        unit.keep(*MOMENTS[unit.group.kind])
        state[unit.name] = {
            name: {
                number: read(part) for number, part in unit.sharded(name, tensor, replica=0).items()
            }
            for name, tensor in unit.state.items()
        }
    return {"step": steps, "state": state}


def _of_adam(
    args: Namespace, chunks: Sequence[Any], steps: int, read: ReadPart
) -> dict[str, Any] | list[Any]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_trinity.upstream.parts.canonical_adam import WEIGHTS, native_states

    config, overrides = get_megatron_optimizer_config(args)
    for chunk in chunks:
        chunk.ddp_config = DistributedDataParallelConfig()
    chain = get_megatron_optimizer(
        config, list(chunks), config_overrides=overrides, use_gloo_process_groups=False
    )
    model = {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    places = chain.sharded_state_dict(model, is_loading=True)["state"].values()
    states = native_states(chain, _values(places, read), steps)
    for state in states:
        state.pop(WEIGHTS, None)  # the weights of an fp32 model, which are in the model's own state
    return states[0] if len(states) == 1 else states


def _values(places: Any, read: ReadPart) -> Iterator[Tensor]:
    for place in places:
        if isinstance(place, ShardedTensorFactory):  # gate and up, which a rank has in one
            yield place.merge_fn([read(part) for part in place.build()])
        else:
            yield read(place)
