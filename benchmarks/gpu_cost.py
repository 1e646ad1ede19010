"""What does a training step cost a GPU? Counted on a CPU: launches, host syncs, bytes.

One rank of EP 8 of a small `nano`, the other seven fake: forward, backward, optimizer, and all that
runs behind the step. Widths, sequence, window and vocabulary are divided by `--scale`, with fewer
layers; experts, heads and experts a token are those of `nano`. Ours beside megatron-core's own
GPTModel of its local spec, with the same arguments: the same sizes, experts and optimizer, no
sandwich norm, no logsumexp and largest logit of the tokens. With `--optimizer muon` its own Muon
stands beside ours, over whole matrices that are shared out to the ranks. QK norm, output gate and
windows are on both sides. With `--transformer-impl transformer_engine` both have its layers, over
the emulation of the tests, where each function of its extension is one launch.

Operations are those that torch dispatches on a CPU, with the norms and SwiGLU of a GPU in their
place on both sides, and AdamW over lists of tensors. The tokens that fake ranks send are this
rank's own.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.command_line.sides import megatron_cores, random_batches, trainers
from megatron_trinity.errors import TrinityError, UsageError, run_command
from megatron_trinity.planning.costs.parts import (
    BEHIND,
    EMBEDDING,
    EXPERTS,
    GRADIENTS,
    HEAD,
    KINDS,
    OPTIMIZER,
)

if TYPE_CHECKING:
    from megatron_trinity.planning.costs.side import Side
    from megatron_trinity.planning.costs.step import Counts

EXAMPLE = """example:
  OMP_NUM_THREADS=1 python benchmarks/gpu_cost.py
"""

ROOT = Path(__file__).resolve().parents[1]
RANKS = 8
NANO = {
    "hidden-size": 1024,
    "ffn-hidden-size": 3072,
    "kv-channels": 128,
    "moe-ffn-hidden-size": 256,
    "seq-length": 4096,
    "sliding-window": 2048,
    "vocab-size": 200192,
}
"""Of `nano`, what is divided by `--scale`."""

OPTIMIZERS: Mapping[str, Sequence[str]] = {
    "adam": (),
    # The products of a GPU; on a CPU the default is fp32.
    "muon": ("--adamw-lr", "1e-3", "--muon-fp32-matmul-prec", "medium"),
}
"""Name to flags that belong to it."""

TRANSFORMER_ENGINE = "transformer_engine"
LAYERS: Mapping[str, Sequence[str]] = {"local": (), TRANSFORMER_ENGINE: ("--moe-grouped-gemm",)}
"""Kind of layers to flags that belong to it."""

WARM_UP = 2
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """What was counted of one side.

    Attributes:
        parts: layers of each kind.
        logged: a step with a line in the log.
    """

    parts: Mapping[str, int]
    step: Counts
    logged: Counts


def flags(arguments: Namespace, scratch: Path) -> list[str]:
    """The trainer's command line."""
    from megatron_trinity.model.loss import chunk_length

    # 4 bytes a logit: in bf16, with the kernels of a GPU.
    chunk = chunk_length(NANO["seq-length"], NANO["vocab-size"], None, 4)
    options = {
        "--preset": "nano",
        **{f"--{name}": size // arguments.scale for name, size in NANO.items()},
        "--num-layers": arguments.layers,
        "--micro-batch-size": 1,
        "--global-batch-size": RANKS,
        "--expert-model-parallel-size": RANKS,
        "--transformer-impl": arguments.transformer_impl,
        "--optimizer": arguments.optimizer,
        "--tokenizer-type": "NullTokenizer",
        # No step clips: without Apex or Transformer Engine that is operations for each gradient.
        "--clip-grad": 1e6,
        "--train-iters": 1000,
        "--lr-warmup-iters": 0,
        "--log-interval": WARM_UP + 2,
        "--tensorboard-dir": scratch,
        # As many chunks as nano has.
        "--loss-chunk-size": chunk // arguments.scale,
    }
    words = [str(word) for pair in options.items() for word in pair]
    words += LAYERS[arguments.transformer_impl]
    return [*words, *OPTIMIZERS[arguments.optimizer], "--mock-data", "--use-distributed-optimizer"]


def start(arguments: Namespace, scratch: Path) -> Namespace:
    """This process as the last rank, which writes the log; returns Megatron's arguments."""
    last = str(RANKS - 1)
    os.environ |= {"RANK": last, "LOCAL_RANK": last, "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    if arguments.transformer_impl == TRANSFORMER_ENGINE:
        load_transformer_engine()

    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    import torch.distributed as dist
    from megatron.training import get_timers
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_trinity.arguments.parse import parse_arguments as parse
    from megatron_trinity.training.vocabulary import settle_vocabulary

    args = parse(flags(arguments, scratch))
    args.use_gloo_process_groups = False
    args.bias_swiglu_fusion = True  # off on a CPU alone
    set_global_variables(args)
    settle_vocabulary(args)
    dist.init_process_group("fake", store=FakeStore(), rank=RANKS - 1, world_size=RANKS)
    initialize_megatron()
    get_timers()("interval-time", log_level=0).start()  # as the loop does
    return args


def load_transformer_engine() -> None:
    """Its Python modules, over the emulation of the tests.

    Raises:
        TrinityError: there is no environment with it.
    """
    packages = next(ROOT.glob(".venv-te/lib/python*/site-packages"), None)
    if packages is None:
        raise TrinityError("there is no .venv-te yet: bash tests/run.sh -m te makes it")
    os.environ["TRINITY_TEST_TE_PACKAGES"] = str(packages)
    sys.path.insert(0, str(ROOT))
    importlib.import_module("tests.transformer_engine.worker").load_emulated()


def count(args: Namespace, side: Side) -> Result:
    """Count a step, and one with a line in the log."""
    data = next(random_batches(1, args.seq_length, args.vocab_size))
    # Those ahead of them as well: what they leave on the host is known to be there.
    *_, step, logged = (side.counted(data) for _ in range(WARM_UP + 2))
    return Result(side.parts, step, logged)


def figures_of(result: Result) -> dict[tuple[str, str], float]:
    """Unit and case to figure; of a layer they are the mean over its kind."""
    step, parts, moe = result.step, result.parts, KINDS[1]
    experts, per_moe = moe + EXPERTS, parts[moe]
    found: dict[tuple[str, str], float] = {}
    for kind in KINDS:
        found["launches", kind] = of_layer(step.launches, parts, kind)
    found["launches", "routed experts of a layer"] = step.launches[experts] / per_moe
    for part in (EMBEDDING, HEAD, GRADIENTS, OPTIMIZER, BEHIND):
        found["launches", part] = step.launches[part]
    products = step.products[OPTIMIZER]
    found["launches", "optimizer, beside products"] = step.launches[OPTIMIZER] - products
    found["launches", "step"] = step.launches.total()
    for part in (GRADIENTS, OPTIMIZER):
        found["collectives", part] = step.calls[part]
    waits = "host syncs"
    found[waits, KINDS[0]] = synced(step, {KINDS[0]}) / parts[KINDS[0]]
    found[waits, moe] = synced(step, {moe, experts}) / per_moe
    found[waits, "micro-batch, outside of layers"] = synced(step, {EMBEDDING, HEAD})
    found[waits, GRADIENTS] = synced(step, {GRADIENTS})
    found[waits, OPTIMIZER] = synced(step, {OPTIMIZER})
    found[waits, BEHIND] = synced(step, {BEHIND})
    found[waits, "behind a step with a line in the log"] = synced(result.logged, {BEHIND})
    for collective in ("all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter"):
        found["MiB sent", collective] = step.collectives[collective] / MIB
    for kind in KINDS:
        found["MiB kept", kind] = of_layer(step.kept, parts, kind) / MIB
    found["MiB kept", "routed experts of a layer"] = step.kept[experts] / per_moe / MIB
    found["MiB kept", HEAD] = step.kept[HEAD] / MIB
    found["MiB kept", "step"] = step.kept.total() / MIB
    return found


def rows(found: Mapping[str, Result]) -> list[Row]:
    """Ours beside megatron-core's."""
    ours, peer = (figures_of(found[side]) for side in ("ours", "megatron"))
    return [
        make_row(f"{case}, {unit}", value, peer[unit, case], unit)
        for (unit, case), value in ours.items()
    ]


def of_layer(counts: Mapping[str, int], parts: Mapping[str, int], kind: str) -> float:
    """Of one layer of a kind, its experts included."""
    return (counts[kind] + counts[kind + EXPERTS]) / parts[kind]


def synced(counts: Counts, parts: Collection[str]) -> int:
    return sum(number for sync, number in counts.syncs.items() if sync.part in parts)


def show(found: Mapping[str, Result], figures: Sequence[Row]) -> None:
    """Print the figures, and where each side waits."""
    table = Table("", "ours", "megatron-core", "ratio")
    for row in figures:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        table.add_row(row["case"], f"{row['ours']:.4g}", f"{row['peer']:.4g}", ratio)
    console = Console(width=150)
    console.print(table)
    for name, result in found.items():
        table = Table("where", "what", "part of the step", "times", "with a line", title=name)
        for sync in sorted({*result.step.syncs, *result.logged.syncs}):
            times = (str(counts.syncs[sync]) for counts in (result.step, result.logged))
            table.add_row(sync.where, sync.what, sync.part, *times)
        console.print(table)


def main() -> None:
    arguments = parse_arguments()
    sides = {"ours": trainers, "megatron": megatron_cores}
    found = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        args = start(arguments, Path(scratch))  # redirected, since Megatron says much
        from megatron.training import get_tensorboard_writer

        from megatron_trinity.planning.costs.gpu_paths import take_gpu_paths
        from megatron_trinity.planning.costs.side import Side

        take_gpu_paths()
        if args.transformer_impl == TRANSFORMER_ENGINE:
            from megatron_trinity.planning.costs.transformer_engine import count_extension

            count_extension()
        for name, make in sides.items():
            found[name] = count(args, Side(args, *make(args)))
        get_tensorboard_writer().close()
    figures = rows(found)
    show(found, figures)
    write_rows(arguments.json, figures)


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument("--layers", type=int, default=8, help="default %(default)s")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adam", help="default %(default)s"
    )
    parser.add_argument(
        "--scale", type=int, default=8, help="what sizes are divided by (default %(default)s)"
    )
    parser.add_argument("--transformer-impl", choices=LAYERS, default="local", help="of both sides")
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="4 layers, --scale 16")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.scale = 4, 16
    if arguments.layers < 4 or arguments.layers % 4:
        raise UsageError("--layers: use a multiple of 4, which has a layer of every kind")
    if arguments.scale not in (1, 2, 4, 8, 16):
        raise UsageError("--scale: use 1, 2, 4, 8 or 16")
    return arguments


if __name__ == "__main__":
    run_command(main)
