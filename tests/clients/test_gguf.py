"""That llama.cpp's converter finds each tensor and token of an export, as far as `gguf` does it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.clients.exports import CONFIG, client

pytestmark = [pytest.mark.clients, pytest.mark.slow]


def test_names_and_vocabulary(clients_python: Path, exports: Path, tmp_path: Path) -> None:
    export = exports / "bf16"
    found = json.loads(client(clients_python, tmp_path, "gguf_names.py", export).splitlines()[-1])
    names = found["names"]
    assert None not in names.values()
    assert len({*names.values()}) == len(names)
    # Each kind of tensor that the architecture has is there, and no other.
    kinds = {re.sub(r"\d+", "{bid}", name).rsplit(".", 1)[0] for name in names.values()}
    assert kinds == {*found["kinds"]}
    bias = [name for name in names if name.endswith("expert_bias")]
    assert len(bias) == CONFIG.num_hidden_layers - CONFIG.num_dense_layers
    assert {names[name].partition(".exp_")[2] for name in bias} == {"probs_b.bias"}

    tokenizer = AutoTokenizer.from_pretrained(export)
    stored = json.loads((export / "tokenizer.json").read_text())["model"]
    assert found["merges"] == len(stored["merges"])
    assert found["special"]["eos"] == tokenizer.eos_token_id
    assert found["template"] == tokenizer.chat_template
