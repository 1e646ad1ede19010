"""What the `gguf` package makes of an export, as JSON: `gguf_names.py DIRECTORY`.

The steps of llama.cpp's converter that are in that package: the names of tensors (those of a
layer's experts are one there), and the vocabulary's special tokens, merges and chat template.
"""

import json
import re
import sys
from pathlib import Path

import gguf
from safetensors import safe_open

directory = Path(sys.argv[1])
config = json.loads((directory / "config.json").read_text())
names = set()
for file in directory.glob("*.safetensors"):
    with safe_open(file, "pt") as tensors:
        names |= {re.sub(r"experts\.\d+\.", "experts.", name) for name in tensors.keys()}  # noqa: SIM118
arch = gguf.MODEL_ARCH.AFMOE
known = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
suffixed = {name: name.replace("expert_bias", "expert_bias.bias") for name in names}
vocabulary = gguf.SpecialVocab(directory, load_merges=True)
print(
    json.dumps(
        {
            "names": {
                name: known.get_name(text, try_suffixes=(".weight", ".bias"))
                for name, text in suffixed.items()
            },
            "kinds": [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]],
            "special": vocabulary.special_token_ids,
            "merges": len(vocabulary.merges),
            "template": vocabulary.chat_template,
        }
    )
)
