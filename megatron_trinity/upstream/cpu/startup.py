"""Start without CUDA."""

from __future__ import annotations

import inspect
import os

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="cpu-startup",
    symbols=("megatron.training.initialize.initialize_megatron",),
    reason=(
        "`initialize_megatron` refuses to start without CUDA unless its caller says otherwise, "
        "and `pretrain` does not say so. With tensor parallelism the arguments are refused "
        "unless CUDA_DEVICE_MAX_CONNECTIONS is 1, which orders kernels on a GPU and means "
        "nothing here"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`pretrain` passes `allow_no_cuda`, and the variable is asked for with CUDA only",
    when="without_cuda",
    after=("cpu-jit",),
)


def install() -> None:
    """Make `allow_no_cuda=True` the default of `initialize_megatron`, and set the variable."""
    from megatron.training import initialize

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    function = initialize.initialize_megatron
    parameters = inspect.signature(function).parameters.values()
    function.__defaults__ = tuple(
        True if p.name == "allow_no_cuda" else p.default
        for p in parameters
        if p.default is not inspect.Parameter.empty
    )
