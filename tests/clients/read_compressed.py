"""What compressed-tensors and transformers read in an export; run in the environment of vLLM.

    python read_compressed.py DIRECTORY SEQUENCES.json RESULT.safetensors

RESULT has the model's weights by name, and `logits.N`, `[tokens, vocabulary]`, of each sequence of
token ids: inputs of linear layers are rounded to e4m3 by token, as the scheme says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def main() -> None:
    directory, sequences, result = (Path(word) for word in sys.argv[1:])
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    assert scheme == preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]), scheme
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=CompressedTensorsConfig(dequantize=True),
        output_loading_info=True,
    )
    assert not any(report.values()), report
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for number, ids in enumerate(json.loads(sequences.read_text())):
            tensors[f"logits.{number}"] = model.eval()(torch.tensor([ids])).logits[0]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, result)


if __name__ == "__main__":
    main()
