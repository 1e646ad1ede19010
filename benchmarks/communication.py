"""What does a step send? Bytes and collectives of one rank, by kind and group, without a cluster.

One rank of a recommended layout is built with torch's fake process group on the meta device, and
the calls that a step makes are written down in place of being made: those of Megatron's
`DistributedDataParallel` on the real buckets, and those of the optimizer. Beside ours: Megatron's
AdamW with the distributed optimizer and its layer-wise Muon, which send what their buckets say
(and a norm), and gradients all-reduced with weights broadcast by their owners one after the other.

Bytes are what a rank sends with rings: (n-1)/n of a buffer for a reduce-scatter, a gather or a
broadcast, twice that for an all-reduce, and what goes to others for an all-to-all.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.errors import run_command

EXAMPLE = """example:
  python benchmarks/communication.py
  python benchmarks/communication.py --quick --json communication.json
"""
CASES = (("nano", 64), ("nano", 512), ("mini", 512), ("large", 512), ("large", 2048))
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
WAYS = {
    "ours": "ours",
    "adamw": "AdamW, distributed optimizer",
    "layer-wise": "layer-wise Muon",
    "broadcast": "all-reduce and broadcast",
}


@dataclass(frozen=True)
class Kind:
    """A collective, and the number of ranks of its group."""

    name: str
    ranks: int


class Wire:
    """Writes collectives down in place of making them."""

    def __init__(self) -> None:
        self.bytes: Counter[Kind] = Counter()
        self.calls: Counter[Kind] = Counter()

    @property
    def sent(self) -> int:
        """Bytes in all."""
        return self.bytes.total()

    def note(self, name: str, group: Any, sent: float) -> Any:
        kind = Kind(name, group.size())
        if kind.ranks > 1:
            self.bytes[kind] += round(sent)
            self.calls[kind] += 1
        return mock.Mock()

    def ring(self, name: str, tensor: Any, group: Any, times: int = 1) -> Any:
        return self.note(name, group, times * tensor.nbytes * (group.size() - 1) / group.size())

    def all_reduce(self, tensor: Any, op: Any = None, group: Any = None, **_: Any) -> Any:
        return self.ring("all-reduce", tensor, group, times=2)

    def reduce_scatter(self, out: Any, tensor: Any, group: Any = None, **_: Any) -> Any:
        return self.ring("reduce-scatter", tensor, group)

    def all_gather(self, out: Any, tensor: Any, group: Any = None, **_: Any) -> Any:
        return self.ring("all-gather", out, group)

    def broadcast(self, tensor: Any, src: Any = None, group: Any = None, **_: Any) -> Any:
        return self.ring("broadcast", tensor, group)

    def all_to_all(
        self, out: Any, tensor: Any, received: Any, sent: list[int], group: Any = None, **_: Any
    ) -> Any:
        to_others = sum(sent) - sent[group.rank()]
        return self.note("all-to-all", group, to_others * tensor.element_size())

    @contextlib.contextmanager
    def tapped(self) -> Iterator[None]:
        """Meanwhile nothing is sent, and all tensors of the device are on meta."""
        from megatron.core.distributed import param_and_grad_buffer as buffers

        nothing = contextlib.nullcontext(mock.Mock())
        with contextlib.ExitStack() as stack:
            for owner, name, value in (
                (torch.distributed, "all_reduce", self.all_reduce),
                (torch.distributed, "broadcast", self.broadcast),
                (torch.distributed, "all_to_all_single", self.all_to_all),
                (buffers, "dist_reduce_scatter_func", self.reduce_scatter),
                (buffers, "dist_all_gather_func", self.all_gather),
                (buffers, "_coalescing_manager", lambda *_, **__: nothing),
                (torch.cuda, "current_device", lambda: torch.device("meta")),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            yield


def wrapped(args: Any, groups: Any, layouts: Callable[..., list[Any]] | None) -> list[Any]:
    """The rank's chunks in Megatron's DDP."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.training.training import get_megatron_ddp_config

    from megatron_trinity.planning.buffers import bucket_sizes
    from megatron_trinity.planning.fake_ranks import build_chunks

    chunks = build_chunks(args, groups)
    config = get_megatron_ddp_config(args)
    config.check_for_nan_in_grad = False
    config.use_distributed_optimizer = layouts is not None
    config.overlap_param_gather = False  # the same calls, in a row
    config.overlap_grad_reduce = False
    found = layouts(args, chunks, groups) if layouts else [None] * len(chunks)
    config.bucket_size = bucket_sizes(args, chunks, groups)[0]
    return [
        DistributedDataParallel(
            chunk.config, config, chunk, pg_collection=groups, full_param_layout=layout
        )
        for chunk, layout in zip(chunks, found, strict=True)
    ]


def megatron_layouts(maker: Any, args: Any, chunks: list[Any], groups: Any) -> list[Any]:
    """Of Megatron's distributed or layer-wise optimizer."""
    from megatron.training.training import get_megatron_ddp_config

    from megatron_trinity.planning.buffers import bucket_sizes

    config = get_megatron_ddp_config(args)
    return [
        maker(
            [p for p in chunk.parameters() if p.requires_grad],
            size,
            groups.intra_dp_cp.size(),
            config,
            expert_data_parallel_world_size=groups.intra_expt_dp.size(),
        )
        for chunk, size in zip(chunks, bucket_sizes(args, chunks, groups), strict=True)
    ]


def send_ours(args: Any, groups: Any) -> None:
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    from megatron_trinity.optimizer.optimizer import TrinityOptimizer
    from megatron_trinity.optimizer.param_groups import groups_from_args
    from megatron_trinity.planning.buffers import layouts_of_rank

    chunks = wrapped(args, groups, layouts_of_rank)
    config = OptimizerConfig(
        optimizer="muon",
        use_layer_wise_distributed_optimizer=True,
        muon_momentum=args.muon_momentum,
        muon_num_ns_steps=1,  # which sends nothing
        muon_coefficient_type=args.muon_coefficient_type,
        muon_fp32_matmul_prec="medium",
    )
    adamw = partial(torch.optim.AdamW, fused=False)
    with mock.patch.object(
        torch.optim, "AdamW", lambda *a, **k: adamw(*a, **{**k, "fused": False})
    ):
        optimizer = TrinityOptimizer(config, chunks, groups_from_args(args))
    optimizer.optimizer.step = lambda: None  # what sends nothing reads values
    for chunk in chunks:
        chunk.finish_grad_sync()
    with contextlib.suppress(RuntimeError, NotImplementedError):  # no values on meta
        optimizer.get_grad_norm()
    optimizer.step_with_ready_grads()


def send_megatron(way: str, args: Any, groups: Any) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import (
        LayerWiseDistributedOptimizer,
        is_managed_by_layer_wise_optimizer,
    )

    def layer_wise(args: Any, chunks: list[Any], groups: Any) -> list[Any]:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.is_managed_by_layer_wise_optimizer = is_managed_by_layer_wise_optimizer(
                    parameter
                )
        maker = LayerWiseDistributedOptimizer.compute_full_param_layout
        return megatron_layouts(maker, args, chunks, groups)

    adamw = partial(megatron_layouts, DistributedOptimizer.compute_full_param_layout)
    for chunk in wrapped(args, groups, adamw if way == "adamw" else layer_wise):
        chunk.finish_grad_sync()
        chunk.start_param_sync()
    torch.distributed.all_reduce(torch.zeros(1, device="meta"), group=groups.intra_dist_opt)


def send_broadcasts(args: Any, groups: Any) -> None:
    from megatron_trinity.optimizer.assignment import assign
    from megatron_trinity.optimizer.exchange import broadcast_from_owners

    for chunk in wrapped(args, groups, None):
        chunk.finish_grad_sync()
        for experts, group in ((False, groups.dp_cp), (True, groups.expt_dp)):
            held = [p for p in chunk.parameters() if getattr(p, "allreduce", True) != experts]
            by_owner: list[list[Any]] = [[] for _ in range(group.size())]
            owners = assign([p.numel() for p in held], group.size())
            for parameter, owner in zip(held, owners, strict=True):
                by_owner[owner].append(parameter.data)
            broadcast_from_owners(by_owner, group)
    for group in (groups.mp, groups.tp_ep_pp):
        torch.distributed.all_reduce(torch.zeros(1, device="meta"), group=group)


def count(preset: str, world_size: int, way: str) -> Wire:
    """What a rank sends in a step, of the stage with most layers where there are several."""
    from megatron_trinity.planning.fake_ranks import fake_groups, parse_layout
    from megatron_trinity.planning.layouts import recommended

    layout = recommended(preset, world_size)
    args = parse_layout(preset, world_size, (*layout.flags, *OVERLAP))
    stages = args.pipeline_model_parallel_size
    rank = world_size // stages if stages > 1 else 0  # the second stage
    wire = Wire()
    ways: dict[str, Callable[[Any, Any], None]] = {
        "ours": send_ours,
        "adamw": partial(send_megatron, "adamw"),
        "layer-wise": partial(send_megatron, "layer-wise"),
        "broadcast": send_broadcasts,
    }
    with fake_groups(args, rank) as groups, wire.tapped():
        ways[way](args, groups)
    return wire


def main() -> None:
    """Run the benchmark."""
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--quick", action="store_true", help="nano on 64 ranks alone")
    add_json_argument(parser)
    arguments = parser.parse_args()

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    rows: list[Row] = []
    for preset, world_size in CASES[:1] if arguments.quick else CASES:
        wires = {way: count(preset, world_size, way) for way in WAYS}
        Console(width=110).print(table(f"{preset} on {world_size}", wires))
        ours = wires["ours"]
        for way, name in WAYS.items():
            if way != "ours":
                case, peer = f"{preset} on {world_size}, to {name}", wires[way]
                rows += [
                    make_row(case, ours.sent / 1e9, peer.sent / 1e9, "GB"),
                    make_row(case, ours.calls.total(), peer.calls.total(), "collectives"),
                ]
    write_rows(arguments.json, rows)


def table(title: str, wires: dict[str, Wire]) -> Table:
    """A line for each kind and group, and their sum."""
    found = Table("collective", "ranks", *WAYS.values(), title=f"{title}: GB sent, calls")
    kinds = sorted(
        {k for wire in wires.values() for k in wire.calls}, key=lambda k: (k.name, k.ranks)
    )
    for kind in kinds:
        cells = [f"{w.bytes[kind] / 1e9:.3f}, {w.calls[kind]}" for w in wires.values()]
        found.add_row(kind.name, str(kind.ranks), *cells)
    sums = [f"{w.sent / 1e9:.3f}, {w.calls.total()}" for w in wires.values()]
    found.add_row("all", "", *sums)
    return found


if __name__ == "__main__":
    run_command(main)
