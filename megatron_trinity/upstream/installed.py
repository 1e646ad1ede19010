"""What is installed of the packages that megatron-core uses on a GPU, and whether it is whole.

megatron-core looks for each of them by importing it, here and there, and takes an ImportError for
its absence. One of which half is there ends the import of megatron-core with a traceback, or is
used in some places and not in others; so it is refused, before megatron-core is imported.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from megatron_trinity.errors import TrinityError

TRANSFORMER_ENGINE = "2.20.2"
"""The version that this project was written for."""

INSTALL_TRANSFORMER_ENGINE = (
    f"pip install --no-build-isolation 'transformer-engine[pytorch]=={TRANSFORMER_ENGINE}'"
)
UNINSTALL_TRANSFORMER_ENGINE = (
    "pip uninstall transformer-engine transformer-engine-torch transformer-engine-cu12 "
    "transformer-engine-cu13"
)
NVIDIA_APEX = "github.com/NVIDIA/apex"


@dataclass(frozen=True)
class Installed:
    """What there is to run kernels with.

    Attributes:
        transformer_engine: its version, or None.
        apex: NVIDIA's Apex, with the kernels that megatron-core uses where Transformer Engine is
            absent.
        wgrad_fusion: Apex's kernel that adds a weight's gradient up in fp32 while it is computed.
        deep_ep: DeepEP.
        triton: Triton, with the C compiler and the headers of Python that it compiles with.
    """

    transformer_engine: str | None = None
    apex: bool = False
    wgrad_fusion: bool = False
    deep_ep: bool = False
    triton: bool = False


@functools.cache
def find_installed() -> Installed:
    """Look for the packages; those that are there are imported, as megatron-core would.

    Raises:
        TrinityError: one of them is not whole, was built for another torch, or is another package
            of the same name.
    """
    apex = _apex()
    return Installed(
        transformer_engine=_transformer_engine(),
        apex=apex,
        wgrad_fusion=apex and _has_kernels("fused_weight_gradient_mlp_cuda"),
        deep_ep=_there("deep_ep"),
        triton=_there("triton") and can_compile(),
    )


def can_compile() -> bool:
    """Whether Triton finds what it compiles its launchers with."""
    compiler = os.environ.get("CC") or "gcc"
    compilers = (compiler, "gcc", "clang", "cc")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return any(shutil.which(name) for name in compilers) and headers.is_file()


def _there(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


def _transformer_engine() -> str | None:
    if not _there("transformer_engine"):
        return None
    try:
        with warnings.catch_warnings():
            # What it warns of when its half for torch is missing is an error here.
            warnings.simplefilter("ignore", RuntimeWarning)
            package = importlib.import_module("transformer_engine")
            importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        raise TrinityError(_what_is_wrong(error)) from error
    return str(getattr(package, "__version__", None) or metadata.version("transformer-engine"))


def _what_is_wrong(error: Exception) -> str:
    reason = " ".join(str(error).split()).rstrip(".")
    way_out = f"{INSTALL_TRANSFORMER_ENGINE}, or {UNINSTALL_TRANSFORMER_ENGINE}"
    if "undefined symbol" in reason:
        return f"Transformer Engine was built for another torch than {_torch()}: {way_out}"
    if isinstance(error, FileNotFoundError) or "meta package" in reason:
        return f"Transformer Engine is installed without its part for torch: {way_out}"
    return f"Transformer Engine cannot be imported ({reason[:200]}): {way_out}"


def _apex() -> bool:
    if not _there("apex"):
        return False
    if not _is_nvidias(find_spec("apex").submodule_search_locations or []):  # type: ignore[union-attr]
        raise TrinityError(
            "the package apex that is installed is not NVIDIA's, but PyPI's of the same name, "
            "which megatron-core would take for it: pip uninstall apex, and build NVIDIA's from "
            f"{NVIDIA_APEX} if you want it"
        )
    if not _has_kernels("amp_C"):
        raise TrinityError(
            "Apex is installed without its kernels (amp_C), which megatron-core would use: build "
            f"it from {NVIDIA_APEX} with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or pip uninstall apex"
        )
    return True


def _is_nvidias(folders: list[str]) -> bool:
    # PyPI's is a web toolkit; importing it to find out could do anything.
    return any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders)


def _has_kernels(extension: str) -> bool:
    """Whether a compiled module of Apex's is there."""
    if not _there(extension):
        return False
    try:
        importlib.import_module(extension)
    except ImportError as error:
        raise TrinityError(
            f"Apex's {extension} was built for another torch than {_torch()}: build it again from "
            f"{NVIDIA_APEX}, or pip uninstall apex"
        ) from error
    return True


def _torch() -> str:
    return metadata.version("torch")
