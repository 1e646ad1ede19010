"""What Transformer Engine asks about its libraries before it chooses a way."""

from __future__ import annotations

import sys
from typing import Any

from tests.transformer_engine.emulation.enumerations import DType
from tests.transformer_engine.emulation.extension import NAME, emulates


@emulates
def get_cudnn_version() -> int:
    """9.20."""
    return 92000


@emulates
def get_cublasLt_version() -> int:
    """13.1: grouped products take a list of tensors."""
    return 130100


@emulates
def get_num_cublas_streams() -> int:
    """As many as the library has."""
    return 4


@emulates
def get_fused_attn_backend(parameters: Any) -> tuple[Any, str]:
    """cuDNN's attention is for 16 bits; fp32 takes Transformer Engine's plain torch."""
    backends = sys.modules[NAME].NVTE_Fused_Attn_Backend
    if int(parameters.qkv_dtype) in (DType.kBFloat16, DType.kFloat16) and not parameters.dropout:
        return backends.NVTE_F16_arbitrary_seqlen, ""
    return backends.NVTE_No_Backend, "only 16 bits without dropout are emulated"
