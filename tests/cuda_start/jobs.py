"""What ranks of a machine that reports CUDA are asked to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_trinity.errors import UsageError


def parsed(rank: int, world_size: int, words: Sequence[str], environment: dict[str, str]) -> Any:
    """The arguments that a command line ends as and the environment then, or its refusal."""
    from unittest import mock

    from megatron_trinity.arguments.machine import machine_notes
    from megatron_trinity.arguments.parse import parse_arguments

    with mock.patch.dict(os.environ, environment):
        try:
            args = parse_arguments(words)
        except UsageError as error:
            return str(error)
        return {
            "args": {name: _plain(value) for name, value in vars(args).items()},
            "environment": dict(os.environ),
            "notes": list(machine_notes(args)),
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def built(rank: int, world_size: int, preset: str, ranks: int, flags: Sequence[str]) -> int:
    """Parameters of rank 0 of a layout, its model built on the meta device."""
    import torch.distributed as dist

    from megatron_trinity.planning.fake_ranks import build_rank, parse_layout

    dist.destroy_process_group()
    of_rank = build_rank(parse_layout(preset, ranks, flags), 0)
    return of_rank.dense + of_rank.expert


def trained(
    rank: int, world_size: int, flags: Sequence[str], file: Path
) -> tuple[int, dict[str, int]]:
    """Exit code of a training run, and how often it called which kernel of the stand-ins."""
    from tests.steps import run_recorded

    kernels = sys.modules.get("tests.cuda_start.stand_ins.kernels_in_torch")
    if kernels is not None:
        kernels.CALLS.clear()
    code = run_recorded(rank, world_size, flags, file)
    return code, dict(kernels.CALLS) if kernels is not None else {}


def operations(rank: int, world_size: int, flags: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether torch was told to be deterministic in a run, and the operations that it ran."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from tests.trainer import run_trainer

    seen: set[str] = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            floating = any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args)
            seen.add(f"{function}{' of floats' if floating else ''}")
            return function(*args, **(kwargs or {}))

    try:
        with Recorder():
            assert run_trainer(rank, world_size, flags) == 0
        return torch.are_deterministic_algorithms_enabled(), sorted(seen)
    finally:
        torch.use_deterministic_algorithms(False)


def configured(rank: int, world_size: int, words: Sequence[str], ranks: int) -> dict[str, Any]:
    """What the model's configuration says of precision, on the first of `ranks` ranks."""
    from unittest import mock

    from megatron_trinity.arguments.parse import parse_arguments
    from megatron_trinity.model.config import model_config_from_args

    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(ranks), "RANK": "0"}):
        args = parse_arguments(words)
    args.padded_vocab_size = args.vocab_size
    config = model_config_from_args(args).transformer
    names = ("bf16", "fp8", "fp8_recipe", "fp8_param", "moe_grouped_gemm", "transformer_impl")
    return {name: _plain(getattr(config, name)) for name in names}
