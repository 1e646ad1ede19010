"""Training steps: tokens per second, MFU and memory, of `nano` and of blocks of `mini` and `large`.

Blocks have the widths of their preset and fewer layers; of `large` the experts that a rank of EP 8
holds. With 8 GPUs `nano` is whole, on the layout that docs/scale.md recommends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.gpu.children import failure_of
from tests.gpu.machine import TOY_SIZES, Machine
from tests.gpu.rows import Row, at_most, beside, failed, measured, skipped
from tests.gpu.sides import TOY

GIB = 2**30
STATE = 1.05
"""What a rank's state may take, over the planner's estimate."""
NODE = 8
CORE = "megatron-core"
Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        options: the trainer's, by name.
        ranks: GPUs.
    """

    name: str
    options: dict[str, object]
    ranks: int = 1


CASES = (
    Case("12 layers of nano", {"preset": "nano", "num-layers": 12}),
    Case("4 layers of mini", {"preset": "mini", "num-layers": 4}),
    Case(
        "4 layers of large, EP 8's experts",
        {
            "preset": "large",
            "num-layers": 4,
            "num-dense-layers": 2,
            "num-experts": 32,
            "vocab-size": 50048,
        },
    ),
    Case("nano, EP 8", {"preset": "nano", "expert-model-parallel-size": NODE}, NODE),
)
TOYS = (Case("a layer of each kind", {"preset": "tiny", **TOY_SIZES}),)


def rows(machine: Machine) -> Iterator[Row]:
    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()
    gpus = 1 if machine.toy else torch.cuda.device_count()
    with TemporaryDirectory() as scratch:
        for case in machine.size(CASES, TOYS):
            if case.ranks > gpus:
                yield skipped(f"{case.name}: a step", f"takes {case.ranks} GPUs, of {gpus} here")
                continue
            yield from of_case(machine, case, Path(scratch))


def of_case(machine: Machine, case: Case, scratch: Path) -> Iterator[Row]:
    from megatron_trinity.upstream.installed import find_installed

    te = not machine.toy and find_installed().transformer_engine is not None
    kinds = ("transformer_engine", "local") if te else ("local",)
    if not te:
        yield skipped(f"{case.name}: on its layers", "Transformer Engine is not installed")
    peers = {}
    if case.ranks == 1:
        flags = flags_of(machine, case, "--transformer-impl", "local")
        peers["transformers"] = run(case, "transformers", flags, scratch)
    for kind in kinds:
        name = f"{case.name}, {'portable' if kind == 'local' else 'Transformer Engine'}"
        flags = flags_of(machine, case, "--transformer-impl", kind)
        mine = run(case, "ours", flags, scratch)
        if isinstance(mine, str):
            yield failed(f"{name}: a step", mine)
            continue
        peers[CORE] = run(case, CORE, flags, scratch)
        for peer, figures in peers.items():
            if isinstance(figures, str):
                yield skipped(f"{name}: beside {peer}", f"it failed: {figures}")
        whole = {peer: f for peer, f in peers.items() if not isinstance(f, str)}
        yield from of_side(machine, name, mine, whole, case.ranks)


def of_side(
    machine: Machine, name: str, mine: Figures, peers: dict[str, Figures], ranks: int
) -> Iterator[Row]:
    tokens = ranks * mine["tokens"]
    for peer, figures in peers.items():
        speeds = (tokens / mine["seconds"], tokens / figures["seconds"])
        yield beside(f"{name}: training step", speeds, peer, "tokens/s", more_is_better=True)
    its = peers.get(CORE, {})
    if machine.peak_flops is None:
        yield skipped(f"{name}: MFU", f"the peak of {machine.name} is not known")
    else:
        told = f"{CORE}: {mfu(machine, mine, its):.3g}" if its else ""
        yield measured(f"{name}: MFU", mfu(machine, mine, mine), "%", told)
    share = 100 * mine["optimizer"] / mine["seconds"]
    told = f"{CORE}: {100 * its['optimizer'] / its['seconds']:.3g}" if its else ""
    yield measured(f"{name}: the optimizer's share", share, "%", told)
    planned = mine["planned state"] / GIB
    yield at_most(f"{name}: state of a rank", mine["state"] / GIB, STATE * planned, "GiB")
    if not machine.toy:
        peak, plan = mine["peak"] / GIB, mine["planned peak"] / GIB
        yield measured(f"{name}: peak memory", peak, "GiB", f"planned: {plan:.4g}")
        if "planned seconds" in mine:
            told = f"planned: {1e3 * mine['planned seconds']:.4g}"
            yield measured(f"{name}: time of a step", 1e3 * mine["seconds"], "ms", told)
        if its:
            yield beside(f"{name}: peak memory", (peak, its["peak"] / GIB), CORE, "GiB")


def mfu(machine: Machine, model: Figures, side: Figures) -> float:
    """Per cent of the device's peak; a side of equal FLOPs is counted with those of ours."""
    assert machine.peak_flops is not None
    return 100 * model["flops"] / side["seconds"] / machine.peak_flops


def flags_of(machine: Machine, case: Case, *more: str) -> list[str]:
    options = {
        "micro-batch-size": 1,
        **case.options,
        "tokenizer-type": "NullTokenizer",
        "train-iters": 10**6,
        "lr-warmup-iters": 0,
        "lr-decay-style": "constant",
        "optimizer": "muon",
    }
    options["global-batch-size"] = case.ranks * int(str(options["micro-batch-size"]))
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    words += ["--mock-data", "--bf16", "--use-distributed-optimizer"]
    return [*words, *([TOY] if machine.toy else []), *more]


def run(case: Case, side: str, flags: list[str], scratch: Path) -> Figures | str:
    """The figures of one side, or the last line of one that failed."""
    file, log = scratch / "figures.json", scratch / "log"
    launcher = []
    if case.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={case.ranks}"]
    words = [*launcher, "-m", "tests.gpu.sides", side, str(file), *flags]
    failure = failure_of(words, log)
    if failure is not None:
        return failure.told
    found: Figures = json.loads(file.read_text())
    return found
