"""Import Transformer Engine's Python modules on the emulated extension."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

from tests.transformer_engine.emulation import (  # noqa: F401 - they register what they emulate
    attention,
    optimizer,
    products,
    quantized,
    questions,
    sequences,
)
from tests.transformer_engine.emulation.extension import NAME, build_extension

_PACKAGE = "transformer_engine"
# Its own switch for building the package: the core library is not loaded.
_NO_LIBRARY = "NVTE_PROJECT_BUILDING"


def install_emulation() -> None:
    """To be called before anything imports Transformer Engine, as megatron-core does.

    `emulation.cuda.pretend_cuda` belongs to it, after the stand-ins for a machine without CUDA.

    Raises:
        RuntimeError: it is imported already, on whatever it found.
    """
    if _PACKAGE in sys.modules:
        raise RuntimeError("Transformer Engine is already imported")
    sys.modules[NAME] = build_extension()
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # delayed scales in its own torch
    os.environ[_NO_LIBRARY] = "1"
    try:
        _import_without_libraries()
    finally:
        del os.environ[_NO_LIBRARY]
    distributed: Any = importlib.import_module(f"{_PACKAGE}.pytorch.distributed")
    # Recompute restores the states of random numbers; here they are those of the CPU.
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _import_without_libraries() -> None:
    """`.common` first, so that its loader is replaced before the package runs and calls it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(_PACKAGE)
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    common: Any = importlib.import_module(f"{_PACKAGE}.common")
    common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    importlib.import_module(f"{_PACKAGE}.pytorch")
