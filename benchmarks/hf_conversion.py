"""Does Nano go from Hugging Face to Megatron and back, and in how much time and memory?

A random directory with the exact shapes of the `nano` preset (6.12 B parameters, 12.2 GB in bf16)
is written file by file, imported and exported by the command lines, and compared bit by bit. `cp`
of the same files, with what it wrote flushed to disk as the conversions do, is the other side. It
all takes about 37 GB under --scratch for a while, and is removed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AfmoeConfig

from megatron_trinity.checkpoint.conversion.rows import Shape
from megatron_trinity.checkpoint.conversion.tensor_bytes import read_into, write_from
from megatron_trinity.checkpoint.hf.config import config_json
from megatron_trinity.checkpoint.hf.mapping import entries
from megatron_trinity.checkpoint.hf.safetensors_files import lay_out
from megatron_trinity.checkpoint.hf.source import INDEX, open_hf_directory
from megatron_trinity.command_line.parser import command_parser
from megatron_trinity.command_line.rows import Row, add_json_argument, make_row, write_rows
from megatron_trinity.errors import TrinityError, run_command

EXAMPLE = """example:
  python benchmarks/hf_conversion.py --scratch /tmp
"""

ROOT = Path(__file__).resolve().parent.parent
FILE_BYTES = 5 * 10**9
PART = 2**26
"""Values that are made or compared at a time."""

SECONDS_BETWEEN_LOOKS = 0.1
COPIES = 3  # of the directory at once: itself, the checkpoint and the export, or that of `cp`
LIMIT = 4 * 2**30
"""Bytes that all processes of a conversion together may hold."""


@dataclass(frozen=True)
class Run:
    """A command as it was measured: seconds, and the most that its processes held, in bytes."""

    seconds: float
    peak: int


def model(quick: bool) -> AfmoeConfig:
    """The configuration of `nano`, or of a small model."""
    sizes = {
        "vocab_size": 200192,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 56,
        "num_dense_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "route_scale": 2.826,
        "sliding_window": 2048,
        "mup_enabled": True,
    }
    if quick:
        sizes |= {"vocab_size": 8192, "num_hidden_layers": 4, "num_experts": 16}
    return AfmoeConfig(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **sizes)


def write_random(path: Path, config: AfmoeConfig) -> int:
    """Write a directory of random weights, a part of a tensor at a time; returns its bytes."""
    path.mkdir()
    files: list[dict[str, tuple[torch.dtype, Shape]]] = [{}]
    size = 0
    for entry in entries(config):
        for name, shape in entry.hf.items():
            dtype = torch.float32 if len(shape) == 1 else torch.bfloat16
            nbytes = math.prod(shape) * dtype.itemsize
            if size + nbytes > FILE_BYTES:
                files.append({})
                size = 0
            files[-1][name] = dtype, shape
            size += nbytes
    generator = torch.Generator().manual_seed(1)
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        layout = lay_out((name, *said) for name, said in tensors.items())
        with open(path / file, "wb", buffering=0) as stream:
            stream.write(layout.header)
            for name, (dtype, shape) in tensors.items():
                left, offset = math.prod(shape), layout.offsets[name]
                while left:
                    values = torch.empty(min(left, PART), dtype=dtype)
                    values.uniform_(-0.05, 0.05, generator=generator)
                    write_from(stream.fileno(), offset, values)
                    left, offset = left - len(values), offset + values.nbytes
        total += layout.size
    (path / "config.json").write_text(json.dumps(config_json(config, "bfloat16")))
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


def measure(command: Sequence[str]) -> Run:
    """Run a command, and watch what it and its processes hold.

    Raises:
        TrinityError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began, peak = time.perf_counter(), 0
    process = psutil.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        peak = max(peak, _resident(process))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise TrinityError(f"{' '.join(command)} failed: {process.stderr.read()[-500:]}")
    return Run(seconds, peak)


def _resident(process: psutil.Process) -> int:
    held = 0
    try:
        for one in (process, *process.children(recursive=True)):
            held += one.memory_info().rss
    except psutil.Error:
        pass  # it has just ended
    return held


def refuse_difference(one: Path, other: Path) -> None:
    """Compare every tensor of two directories bit by bit, a part at a time.

    Raises:
        TrinityError: they differ.
    """
    first, second = open_hf_directory(one).tensors, open_hf_directory(other).tensors
    if first.keys() != second.keys():
        raise TrinityError("the export has other tensors")
    for name, a in first.items():
        b = second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise TrinityError(f"{name} became {b.dtype} {b.shape}")
        left, done = math.prod(a.shape) * (4 if a.dtype == "F32" else 2), 0
        while left:
            parts = [torch.empty(min(left, PART), dtype=torch.uint8) for _ in range(2)]
            for stored, part in zip((a, b), parts, strict=True):
                with open(stored.file, "rb") as stream:
                    read_into(stream.fileno(), stored.offset + done, part)
            if not torch.equal(*parts):
                raise TrinityError(f"{name} changed")
            left, done = left - len(parts[0]), done + len(parts[0])


def convert(scratch: Path, config: AfmoeConfig, workers: int) -> tuple[int, dict[str, Run]]:
    """Write, copy, import, export, compare; returns the bytes and the runs."""
    hf, copy, save, back = (scratch / name for name in ("hf", "copy", "save", "back"))
    size = write_random(hf, config)
    tools, flags = ROOT / "tools", ["--workers", str(workers)]
    python = sys.executable
    runs = {"cp": measure(["sh", "-c", f"cp -r '{hf}' '{copy}' && sync '{copy}'/*"])}
    shutil.rmtree(copy)
    runs["import"] = measure(
        [python, str(tools / "import_hf.py"), "--hf", str(hf), "--save", str(save), *flags]
    )
    runs["export"] = measure(
        [python, str(tools / "export_hf.py"), "--load", str(save), "--hf", str(back), *flags]
    )
    refuse_difference(hf, back)
    return size, runs


def show(size: int, runs: dict[str, Run]) -> None:
    out = Table(title=f"{size / 1e9:.2f} GB, equal bit by bit after import and export")
    for column in ("", "s", "MB/s", "of cp", "peak resident GiB"):
        out.add_column(column, justify="right" if column else "left")
    for name, run in runs.items():
        share = runs["cp"].seconds / run.seconds
        cells = (f"{run.seconds:.1f}", f"{size / 1e6 / run.seconds:.0f}", f"{share:.0%}")
        out.add_row(name, *cells, f"{run.peak / 2**30:.2f}")
    Console().print(out)


def rows(runs: dict[str, Run]) -> list[Row]:
    """What `--json` writes: time of each conversion against `cp`, and memory against the limit."""
    found = []
    for name in ("import", "export"):
        run = runs[name]
        found.append(make_row(f"{name}, time", run.seconds, runs["cp"].seconds, "s"))
        found.append(make_row(f"{name}, memory", run.peak, LIMIT, "bytes"))
    return found


def parse_arguments() -> Namespace:
    parser = command_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where there is room"
    )
    parser.add_argument("--workers", type=int, default=2, help="(default %(default)s)")
    add_json_argument(parser)
    parser.add_argument("--quick", action="store_true", help="a small model")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    config = model(arguments.quick)
    values = sum(math.prod(entry.shape) for entry in entries(config))
    needed, free = 2 * values * COPIES, shutil.disk_usage(arguments.scratch).free
    if needed > free:
        raise TrinityError(
            f"{needed / 1e9:.0f} GB are needed and {arguments.scratch} has {free / 1e9:.0f} free"
        )
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="hf_conversion-") as scratch:
        size, runs = convert(Path(scratch), config, arguments.workers)
    show(size, runs)
    write_rows(arguments.json, rows(runs))


if __name__ == "__main__":
    run_command(main)
