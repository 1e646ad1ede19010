"""Environment variables that kernels read once, when CUDA, NCCL and cuBLAS start."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_trinity.errors import UsageError

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL = 10
"""Compute capability from which on work queues need no order of their own."""


@dataclass(frozen=True)
class Setting:
    """A variable that arguments ask for.

    Attributes:
        name: of the variable.
        value: what it is set to where it is not set.
        fine: other values that do as well.
        why: what asks for it.
    """

    name: str
    value: str
    fine: tuple[str, ...]
    why: str


DETERMINISM: tuple[Setting, ...] = tuple(
    Setting(name, value, fine, "--deterministic-mode")
    for name, value, fine in (
        # An order of sums that does not depend on what arrives first.
        ("NCCL_ALGO", "Ring", ("CollnetDirect", "CollnetChain", "^NVLS")),
        # One workspace a stream, so that the same product takes the same algorithm.
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", (":16:8",)),
        # No atomic additions in the backward of Transformer Engine's attention.
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", ()),
    )
)

ORDERED_QUEUES = Setting(
    CONNECTIONS,
    "1",
    (),
    "tensor or context parallelism on a GPU ahead of Blackwell, whose communication is to start "
    "ahead of the product that it overlaps with",
)


def settings(args: Namespace, capability: int | None) -> tuple[Setting, ...]:
    """What arguments ask for.

    Args:
        capability: the major number of the GPU's compute capability; None without a GPU.
    """
    split = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    ordered = split and capability is not None and capability < BLACKWELL
    return (
        *((ORDERED_QUEUES,) if ordered else ()),
        *(DETERMINISM if args.deterministic_mode else ()),
    )


def missing(wanted: tuple[Setting, ...], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that have to be set, with their values.

    Raises:
        UsageError: one is set to a value that does not do; with the line to type.
    """
    for setting in wanted:
        given = environment.get(setting.name)
        if given is not None and not _does(setting, given):
            raise UsageError(
                f"{setting.name} is {given!r}, and {setting.why} needs {setting.value}: "
                f"unset {setting.name}, or export {setting.name}={setting.value}"
            )
    return {s.name: s.value for s in wanted if s.name not in environment}


def _does(setting: Setting, given: str) -> bool:
    # NCCL takes several, separated by commas.
    words = [word.strip() for word in given.split(",")]
    return all(word in (setting.value, *setting.fine) for word in words)
