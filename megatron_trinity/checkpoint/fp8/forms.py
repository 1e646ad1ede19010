"""The forms in which an AfMoE directory can hold matrices in FP8, and what its readers expect.

`block` is the `fp8` form of transformers (`FineGrainedFP8Config`) and vLLM: a scale for each block
of 128 x 128. `compressed-tensors` is the scheme FP8_DYNAMIC of that library, which transformers and
vLLM read: a scale for each row. Both scale inputs as they come and need no calibration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_trinity.checkpoint.conversion.rows import Shape
from megatron_trinity.checkpoint.fp8.quantize import scale_shape
from megatron_trinity.checkpoint.hf.mapping import Entry
from megatron_trinity.errors import TrinityError

FormName = Literal["block", "compressed-tensors"]


@dataclass(frozen=True)
class Form:
    """How matrices in FP8 are stored and described.

    Attributes:
        rows: of a block.
        columns: of a block; without it a block has those of its matrix.
        suffix: of the scales' name, after the matrix's.
        scale_dtype: type of the scales.
        said: what `config.json` says as `quantization_config`.
        kept: the key there of the modules whose matrices stay as they are.
        only_whole: readers need matrices that are whole blocks.
    """

    rows: int
    columns: int | None
    suffix: str
    scale_dtype: torch.dtype
    said: dict[str, Any]
    kept: str
    only_whole: bool

    def block(self, shape: Shape) -> Shape:
        """Rows and columns of the blocks of a matrix of `shape`."""
        return self.rows, self.columns or shape[1]

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scales of a matrix of `shape`."""
        return scale_shape(shape, self.block(shape))

    def scale_name(self, name: str) -> str:
        """The name of the scales of a matrix."""
        return f"{name}{self.suffix}"


def form(name: FormName, dtype: torch.dtype) -> Form:
    """The form of that name.

    Args:
        dtype: of the matrices that stay as they are.
    """
    if name == "block":
        return Form(
            rows=128,
            columns=128,
            suffix="_scale_inv",
            scale_dtype=torch.float32,
            said={
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            },
            kept="modules_to_not_convert",
            only_whole=True,
        )
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    return Form(
        rows=1,
        columns=None,
        suffix="_scale",
        # As the library writes it. transformers makes scales of the model's type, and a scale that
        # is rounded after its values would shift them.
        scale_dtype=dtype,
        said={
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
        },
        kept="ignore",
        only_whole=False,
    )


def is_quantized(entry: Entry) -> bool:
    """Whether a tensor of the table is made of matrices that FP8 is for."""
    return all(name.endswith("_proj.weight") for name in entry.hf)


def quantization_config(form: Form, table: Iterable[Entry]) -> dict[str, Any]:
    """What `config.json` says of the form, with the modules whose matrices stay as they are."""
    kept = [
        name.removesuffix(".weight")
        for entry in table
        if not is_quantized(entry)
        for name, shape in entry.hf.items()
        if len(shape) > 1
    ]
    return {**form.said, form.kept: kept}


def refuse_partial_blocks(form: Form, quantized: Iterable[Entry]) -> None:
    """Refuse matrices that are not whole blocks, where readers need those.

    vLLM refuses blocks that lie in two of the matrices that it merges (query, key and value; gate
    and up), and transformers takes the size of a block to be that of the matrix over the number of
    scales.

    Raises:
        TrinityError: there is one.
    """
    if not form.only_whole:
        return
    for entry in quantized:
        for name, shape in entry.hf.items():
            block = form.block(shape)
            if any(size % of_block for size, of_block in zip(shape, block, strict=True)):
                raise TrinityError(
                    f"{name} is {shape[0]} x {shape[1]}, and FP8 blocks need multiples of "
                    f"{form.rows}; export it with --fp8 compressed-tensors or without --fp8"
                )
