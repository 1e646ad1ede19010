"""How fast is the portable core attention, and how much memory does it take?

Forward and backward of one layer with `nano`'s heads (8 of queries, 2 of keys and values, head_dim
128, fp32, batch 1) against megatron-core's unfused `DotProductAttention` on the same tensors,
alternating in one process; peak memory in a process of its own each. Then a local layer alone on
longer sequences: its memory has to grow linearly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_trinity.command_line.parser import command_parser, require_at_least_one
from megatron_trinity.command_line.peak_memory import peak_memory
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.single_rank import start_single_rank_group
from megatron_trinity.errors import run_command

EXAMPLE = """example:
  OMP_NUM_THREADS=1 python benchmarks/attention.py
"""
HEADS, GROUPS, HEAD_DIM = 8, 2, 128
LOCAL_LAYER, GLOBAL_LAYER = 1, 4
MIB = 2**20
KINDS: tuple[str, ...] = ("ours", "peer")


@dataclass(frozen=True)
class Case:
    """A layer and a length; `layer` is 1-based, and every fourth is global."""

    layer: int
    length: int
    window: int

    @property
    def name(self) -> str:
        if self.layer == GLOBAL_LAYER:
            return f"global, s = {self.length}"
        return f"local, W = {self.window}, s = {self.length}"


@dataclass(frozen=True)
class Figures:
    """Seconds of each repetition, and MiB, by kind."""

    seconds: dict[str, list[float]]
    memory: dict[str, float]

    def median(self, kind: str) -> float:
        return statistics.median(self.seconds[kind])


def attention(case: Case, kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The core attention of one layer, `[s, b, heads, d]` to `[s, b, n * d]`."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_trinity.model.core_attention import PortableCoreAttention

    config = TransformerConfig(
        num_layers=GLOBAL_LAYER,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        window_size=(case.window - 1, 0),
        window_attn_skip_freq=GLOBAL_LAYER,
    )
    module = {"ours": PortableCoreAttention, "peer": DotProductAttention}[kind]
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    core = module(config, case.layer, AttnMaskType.causal, "self", pg_collection=groups)
    return lambda query, key, value: core(query, key, value, None)


def tensors(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(length, 1, heads, HEAD_DIM, generator=generator).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def forward_and_backward(core: Callable[..., Tensor], qkv: Sequence[Tensor]) -> list[Tensor]:
    out = core(*qkv)
    return [out, *torch.autograd.grad(out.sum(), qkv)]


def seconds(case: Case, kinds: Sequence[str], repetitions: int) -> dict[str, list[float]]:
    """Alternating; the first of each is a warm-up, and shows that they agree."""
    qkv = tensors(case.length)
    cores = {kind: attention(case, kind) for kind in kinds}
    results = [forward_and_backward(core, qkv) for core in cores.values()]
    for ours, peers in zip(results[0], results[-1], strict=True):
        torch.testing.assert_close(ours, peers, rtol=1e-4, atol=1e-4)
    del results
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repetitions):
        for kind, core in cores.items():
            began = time.perf_counter()
            forward_and_backward(core, qkv)
            taken[kind].append(time.perf_counter() - began)
    return taken


def memory(case: Case, kind: str) -> float:
    """MiB above what a process has with its tensors made."""

    def prepare() -> Callable[[], object]:
        qkv = tensors(case.length)
        core = attention(case, kind)
        return lambda: forward_and_backward(core, qkv)

    return peak_memory(prepare) / MIB


def rows(figures: dict[Case, Figures]) -> list[Row]:
    """What `--json` writes."""
    return [
        make_row(f"{what}: {case.name}", values["ours"], values.get("peer"), unit)
        for case, found in figures.items()
        for what, unit, values in (
            ("forward and backward", "ms", {k: 1000 * found.median(k) for k in found.seconds}),
            ("peak memory", "MiB", found.memory),
        )
    ]


def table(found: Sequence[Row]) -> Table:
    out = Table("case", "ours", "DotProductAttention", "unit", "ratio")
    for row in found:
        ours, peer, ratio = (
            f"{number:.1f}" if number is not None else ""
            for number in (row["ours"], row["peer"], row["ratio"])
        )
        out.add_row(row["case"], ours, peer, row["unit"], ratio)
    return out


def start_megatron() -> None:
    """A world of one rank, on the CPU."""
    from megatron.core import parallel_state, tensor_parallel

    start_single_rank_group()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def main() -> None:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--repetitions", type=int, default=7, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="shorter sequences, within a minute")
    add_json_argument(parser)
    arguments = parser.parse_args()
    require_at_least_one("--repetitions", arguments.repetitions)
    start_megatron()
    length, window = (1024, 128) if arguments.quick else (4096, 512)
    cases = {Case(layer, length, window): KINDS for layer in (LOCAL_LAYER, GLOBAL_LAYER)}
    cases |= {Case(LOCAL_LAYER, factor * length, window): KINDS[:1] for factor in (2, 4)}
    # Memory first: autograd's threads, once started, do not survive a fork.
    peaks = {case: {kind: memory(case, kind) for kind in cases[case]} for case in cases}
    found = rows(
        {
            case: Figures(seconds(case, kinds, arguments.repetitions), peaks[case])
            for case, kinds in cases.items()
        }
    )
    Console(width=110).print(table(found))
    write_rows(arguments.json, found)


if __name__ == "__main__":
    run_command(main)
