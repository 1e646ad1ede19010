"""How fast is a step of Muon, and what does it take? Against megatron-core's Muon and torch's.

The matrices of one rank: `nano`'s routed experts with EP 8, all of a `nano` layer, all of a `large`
layer at a quarter of its width. Ours is the trainer's own code, on parameters as Megatron holds
them. Megatron's `TensorParallelMuon` gets the same parameters, of which it orthogonalises gate and
up projections as one matrix, and once more the matrices, which is the same update as ours;
`torch.optim.Muon`, which knows no fused parameters, gets the matrices. Five Newton-Schulz steps on
every side, in turn in one process; torch computes in bf16 whatever it is given. Peak memory of a
step in a process of its own each, on the matrices of a few layers, since a rank has many.

On a CPU torch, which takes a matrix at a time, is timed on one matrix of each shape, once, and that
is multiplied by their number: in bf16 the whole would take minutes. With `--device cuda` it gets
them all; times are those of CUDA events, and kernel launches are counted.
"""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.peak_memory import peak_memory
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.single_rank import start_single_rank_group
from megatron_trinity.errors import TrinityError, UsageError, run_command

EXAMPLE = """example:
  OMP_NUM_THREADS=1 python benchmarks/muon.py
  python benchmarks/muon.py --device cuda --precision bf16 --layers 8
"""
PEERS = {
    "megatron": "TensorParallelMuon",
    "matrices": "TensorParallelMuon on the matrices",
    "torch": "torch.optim.Muon",
}
LR, MOMENTUM, DECAY, STEPS = 1e-3, 0.95, 0.1, 5
LAYER = "decoder.layers.{layer}."
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # between updates of ours and Megatron's
QUICK_EXPERTS = 2
MEMORY_BYTES = 200e6  # of momentum, on which the peak of a step is measured

Parameters = dict[str, nn.Parameter]
Step = Callable[[], None]


@dataclass(frozen=True)
class Sizes:
    """Of a layer, and the routed experts that a rank has of it."""

    hidden: int
    heads: int
    groups: int
    head: int
    expert: int
    experts: int
    routed: int

    @property
    def qkv(self) -> list[int]:
        """Rows of a query group in the fused projection."""
        query = self.heads // self.groups * self.head
        return [query, query, self.head, self.head]


NANO = Sizes(1024, 8, 2, 128, 256, 16, 128)
LARGE_QUARTER = Sizes(768, 12, 2, 128, 768, 32, 256)


@dataclass(frozen=True)
class Case:
    """What a rank updates."""

    name: str
    sizes: Sizes
    experts_only: bool

    def shapes(self, layers: int) -> dict[str, tuple[int, int]]:
        """Canonical name, with the number of an expert behind it, to shape."""
        s, shapes = self.sizes, {}
        for layer in range(layers):
            prefix = LAYER.format(layer=layer)
            if not self.experts_only:
                shapes[prefix + "self_attention.linear_qkv.weight"] = (
                    s.groups * sum(s.qkv),
                    s.hidden,
                )
                shapes[prefix + "self_attention.linear_proj.weight"] = (
                    s.hidden,
                    s.heads * s.head,
                )
                shapes[prefix + "mlp.router.weight"] = (s.routed, s.hidden)
                shapes[prefix + "mlp.shared_experts.linear_fc1.weight"] = (2 * s.expert, s.hidden)
                shapes[prefix + "mlp.shared_experts.linear_fc2.weight"] = (s.hidden, s.expert)
            for expert in range(s.experts):
                experts = prefix + "mlp.experts.experts."
                shapes[f"{experts}linear_fc1.weight {expert}"] = (2 * s.expert, s.hidden)
                shapes[f"{experts}linear_fc2.weight {expert}"] = (s.hidden, s.expert)
        return shapes


def parameters(case: Case, layers: int, device: str) -> Parameters:
    """Random weights with gradients of low rank and noise, the same for every side."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, (rows, columns) in case.shapes(layers).items():
        parameter = nn.Parameter(torch.randn(rows, columns, generator=generator).to(device) / 32)
        signal = torch.randn(rows, 8, generator=generator) @ torch.randn(
            8, columns, generator=generator
        )
        noise = torch.randn(rows, columns, generator=generator)
        parameter.grad = (signal + 0.1 * noise).to(device)
        found[name] = parameter
    return found


def ours(case: Case, found: Parameters, precision: str) -> Step:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_trinity.optimizer.matrices import pieces
    from megatron_trinity.optimizer.muon import MOMENTUM as BUFFER
    from megatron_trinity.optimizer.muon import Muon, MuonConfig
    from megatron_trinity.optimizer.newton_schulz import coefficients
    from megatron_trinity.optimizer.param_groups import Group
    from megatron_trinity.optimizer.units import Unit

    s = case.sizes
    config: Any = SimpleNamespace(
        num_attention_heads=s.heads,
        num_query_groups=s.groups,
        kv_channels=s.head,
        attention_output_gate=True,
        gated_linear_unit=True,
    )
    group = Group("hidden", "muon", LR, 0.0, DECAY)
    units = []
    for name, parameter in found.items():
        key, _, expert = name.partition(" ")
        halves = parameter.data.chunk(2) if "linear_fc1" in key else [parameter.data]
        rows = [(int(bool(expert)), number, len(halves)) for number in range(len(halves))]
        index = [(0, int(expert), s.experts)] if expert else []
        parts = [
            ShardedTensor.from_rank_offsets(key, half, *index, place, prepend_axis_num=len(index))
            for half, place in zip(halves, rows, strict=True)
        ]
        setattr(parameter, "main_grad", parameter.grad)
        unit = Unit(
            name=name,
            group=group,
            parameter=parameter,
            rows=(0, parameter.shape[0]),
            experts=bool(expert),
            parts=parts,
            pieces=pieces(parameter.data, parts, config),
        )
        unit.keep(BUFFER)
        units.append(unit)
    world = torch.distributed.new_group([0])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    muon = Muon(
        MuonConfig(MOMENTUM, False, coefficients("quintic", STEPS), dtype),
        {False: world, True: world},
    )
    muon.plan(units)

    def step() -> None:
        with torch.no_grad():
            muon.accumulate([u.state[BUFFER] for u in units], [u.gradient for u in units])
            muon.update({"hidden": (LR, DECAY)})

    return step


def megatron(case: Case, found: Parameters, precision: str) -> Step:
    fused = {id(parameter) for name, parameter in found.items() if "linear_qkv" in name}
    return megatron_step(case, list(found.values()), lambda p: id(p) in fused, precision)


def megatron_on_matrices(case: Case, found: Parameters, precision: str) -> Step:
    return megatron_step(case, matrices(case, found), lambda p: False, precision)


def megatron_step(
    case: Case, found: list[nn.Parameter], is_qkv: Callable[[Tensor], bool], precision: str
) -> Step:
    from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

    return TensorParallelMuon(
        found,
        lr=LR,
        momentum=MOMENTUM,
        nesterov=False,
        weight_decay=DECAY,
        split_qkv=True,
        is_qkv_fn=is_qkv,
        qkv_split_shapes=case.sizes.qkv,
        fp32_matmul_prec="medium" if precision == "bf16" else "high",
        num_ns_steps=STEPS,
        scale_mode="shape_scaling",
        tp_mode="duplicated",
    ).step


def torch_muon(case: Case, found: Parameters, precision: str) -> Step:
    return torch_step(matrices(case, found))


def torch_step(matrices: Sequence[nn.Parameter]) -> Step:
    optimizer = torch.optim.Muon(
        matrices,
        lr=LR,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        nesterov=False,
        ns_steps=STEPS,
        adjust_lr_fn="original",
    )

    def step() -> None:
        optimizer.step()

    return step


def matrices_by_shape(case: Case, found: Parameters) -> dict[torch.Size, list[nn.Parameter]]:
    """Every matrix as a parameter with its gradient."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for name, parameter in found.items():
        for rows in matrix_rows(case, name):
            matrix = nn.Parameter(torch.cat([parameter.data[r] for r in rows]))
            matrix.grad = torch.cat([parameter.grad[r] for r in rows])  # type: ignore[index]
            by_shape.setdefault(matrix.shape, []).append(matrix)
    return by_shape


def matrices(case: Case, found: Parameters) -> list[nn.Parameter]:
    return [m for of_shape in matrices_by_shape(case, found).values() for m in of_shape]


def torch_seconds_by_shape(case: Case, layers: int) -> float:
    """Of a step of torch's on a CPU: one matrix of each shape, times their number."""
    by_shape = matrices_by_shape(case, parameters(case, layers, "cpu"))
    return sum(len(ms) * timed(torch_step(ms[:1]), "cpu") for ms in by_shape.values())


def matrix_rows(case: Case, name: str) -> list[list[slice]]:
    """For each matrix in a parameter, the rows that it is made of."""
    rows = case.shapes(1 + int(name.split(".")[2]))[name][0]
    if "linear_fc1" in name:
        return [[slice(0, rows // 2)], [slice(rows // 2, rows)]]
    if "linear_qkv" not in name:
        return [[slice(0, rows)]]
    widths, group = case.sizes.qkv, sum(case.sizes.qkv)
    starts = [sum(widths[:number]) for number in range(len(widths))]
    return [
        [slice(g * group + start, g * group + start + width) for g in range(case.sizes.groups)]
        for start, width in zip(starts, widths, strict=True)
    ]


SIDES: dict[str, Callable[[Case, Parameters, str], Step]] = {
    "ours": ours,
    "megatron": megatron,
    "matrices": megatron_on_matrices,
    "torch": torch_muon,
}


def check_agreement(case: Case, layers: int, device: str, precision: str) -> None:
    """Raises: TrinityError if Megatron's update of matrices that it does not fuse is another."""
    results = {}
    for side in ("ours", "megatron"):
        found = parameters(case, layers, device)
        before = {name: parameter.detach().clone() for name, parameter in found.items()}
        SIDES[side](case, found, precision)()
        results[side] = {
            name: parameter.detach() - before[name]
            for name, parameter in found.items()
            if "linear_fc1" not in name
        }
    for name, update in results["ours"].items():
        error = float((update - results["megatron"][name]).norm() / update.norm())
        if error > TOLERANCE[precision]:
            raise TrinityError(f"{name}: updates differ by {error:.1e} of their norm")


def seconds(
    case: Case, layers: int, device: str, precision: str, repetitions: int
) -> dict[str, list[float]]:
    """Side to seconds of each step, in turn; the first of each is not counted."""
    sides = [side for side in SIDES if device != "cpu" or side != "torch"]
    steps = {s: SIDES[s](case, parameters(case, layers, device), precision) for s in sides}
    taken: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(1 + repetitions):
        for side, step in steps.items():
            taken[side].append(timed(step, device))
    taken = {side: times[1:] for side, times in taken.items()}
    if device == "cpu":
        taken["torch"] = [torch_seconds_by_shape(case, layers)]
    return taken


def timed(step: Step, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def launches(case: Case, layers: int, precision: str) -> dict[str, int]:
    """Side to kernels that a step launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for side, make in SIDES.items():
        step = make(case, parameters(case, layers, "cuda"), precision)
        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        found[side] = sum(
            event.count for event in profiler.key_averages() if "LaunchKernel" in event.key
        )
    return found


def step_memory(case: Case, side: str, precision: str) -> float:
    """Peak of a step above weights and gradients, momentum included, over the momentum's size."""
    layer = 4 * sum(rows * columns for rows, columns in case.shapes(1).values())
    layers = math.ceil(MEMORY_BYTES / layer)

    def prepare() -> Callable[[], object]:
        found = parameters(case, layers, "cpu")
        return lambda: SIDES[side](case, found, precision)()

    return peak_memory(prepare) / (layers * layer)


def rows(case: Case, unit: str, values: Mapping[str, float]) -> list[Row]:
    """A row for each peer."""
    return [
        make_row(f"{case.name}, {unit}, against {name}", values["ours"], values[peer], unit)
        for peer, name in PEERS.items()
        if peer in values
    ]


def table(found: Sequence[Row]) -> Table:
    out = Table("case", "ours", "peer", "ratio")
    for row in found:
        out.add_row(row["case"], f"{row['ours']:.3g}", f"{row['peer']:.3g}", f"{row['ratio']:.2f}")
    return out


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--layers", type=int, default=1, help="default %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of the products, but for torch's (default: fp32 on a CPU, bf16 on CUDA)",
    )
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="a few experts, 2 repetitions")
    arguments = parser.parse_args(argv)
    if arguments.layers < 1 or arguments.repetitions < 1:
        raise UsageError("--layers and --repetitions: use 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no GPU here; use cpu")
    if arguments.quick:
        arguments.repetitions = 2
    arguments.precision = arguments.precision or {"cpu": "fp32", "cuda": "bf16"}[arguments.device]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    start_single_rank_group()
    cases = [
        Case("nano, experts of EP 8", NANO, experts_only=True),
        Case("nano, a layer of EP 8", NANO, experts_only=False),
        Case("large / 4, a layer of EP 8", LARGE_QUARTER, experts_only=False),
    ]
    if arguments.quick:
        few = Sizes(**{**vars(NANO), "experts": QUICK_EXPERTS})
        cases = [Case("nano, 2 experts", few, experts_only=True)]
    layers, precision = arguments.layers, arguments.precision
    found = []
    for case in cases:
        if arguments.device == "cpu":  # before threads are started, which do not survive a fork
            peaks = {s: step_memory(case, s, precision) for s in ("ours", "megatron")}
            found += rows(case, "peak over momentum", peaks)
    for case in cases:
        check_agreement(case, layers, arguments.device, precision)
        taken = seconds(case, layers, arguments.device, precision, arguments.repetitions)
        found += rows(case, "ms", {s: 1e3 * statistics.median(t) for s, t in taken.items()})
        if arguments.device == "cuda":
            found += rows(case, "launches", launches(case, layers, precision))
    Console(width=110).print(table(found))
    write_rows(arguments.json, found)


if __name__ == "__main__":
    run_command(main)
