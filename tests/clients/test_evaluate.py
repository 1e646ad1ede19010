"""`examples/evaluate.sh` on its local tasks, and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AfmoeForCausalLM, AutoTokenizer

from tests.clients.exports import CONFIG, offline, printed
from tests.paths import ROOT

ROWS = 2


def evaluate(tmp_path: Path, hf: Path, *flags: str, **settings: str) -> str:
    """What `examples/evaluate.sh` prints, offline."""
    settings = {"HF": str(hf), "OUT": str(tmp_path / "out"), **settings}
    environment = {**offline(tmp_path), **settings}
    return printed("bash", "examples/evaluate.sh", *flags, cwd=ROOT, env=environment)


class Reference:
    """Log-likelihoods, in nats, of transformers' own logits; `longest` tokens are read at once."""

    longest = CONFIG.max_position_embeddings

    def __init__(self, export: Path) -> None:
        self._model = AfmoeForCausalLM.from_pretrained(export)
        self._tokenizer = AutoTokenizer.from_pretrained(export)

    def _of_last(self, ids: Sequence[int], count: int) -> float:
        """Of the last `count` of the tokens, behind those before them."""
        read = torch.tensor([ids[-self.longest - 1 : -1]])
        with torch.no_grad():
            logits = self._model(read).logits[0, -count:].log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[-count:])[:, None]).sum().item()

    def of_text(self, text: str) -> float:
        """Of a whole text behind the eos."""
        ids = [self._tokenizer.eos_token_id, *self._tokenizer(text).input_ids]
        parts = range(1, len(ids), self.longest)
        ends = (min(start + self.longest, len(ids)) for start in parts)
        return sum(
            self._of_last(ids[:end], end - start) for start, end in zip(parts, ends, strict=True)
        )

    def of_choice(self, context: str, choice: str) -> float:
        """Of what follows a context; the context's last line end counts to what follows."""
        given, ids = (
            self._tokenizer(text).input_ids for text in (context.rstrip(), context + choice)
        )
        return self._of_last(ids, len(ids) - len(given))


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.usefixtures("clients_python")
def test_local_tasks(exports: Path, tmp_path: Path) -> None:
    evaluate(tmp_path, exports / "fp32", "--limit", str(ROWS), "--device", "cpu")
    [results] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    reference = Reference(exports / "fp32")
    tasks = tmp_path / "out/tasks"
    texts = [json.loads(line)["text"] for line in (tasks / "stdlib_text.jsonl").open()][:ROWS]
    lost = -sum(map(reference.of_text, texts)) / math.log(2)
    read = sum(len(text.encode()) for text in texts)
    assert scores["stdlib_text"]["bits_per_byte,none"] == pytest.approx(lost / read, rel=1e-4)

    [samples] = (tmp_path / "out").rglob("samples_stdlib_next_line_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == ROWS
    right = 0
    for row in rows:
        asked, found = row["doc"], [float(response[0]) for response in row["filtered_resps"]]
        expected = [reference.of_choice(asked["context"], choice) for choice in asked["choices"]]
        assert found == pytest.approx(expected, rel=1e-4)
        right += expected.index(max(expected)) == asked["answer"]
    assert scores["stdlib_next_line"]["acc,none"] == right / ROWS


def test_what_each_list_runs(tmp_path: Path) -> None:
    settings = {"DRY_RUN": "1", "PREFIX": "1"}
    local = evaluate(tmp_path, tmp_path / "hf", "--limit", "3", **settings)
    assert "stdlib_text\\,stdlib_next_line" in local
    assert local.endswith("--limit 3 \n")
    report = evaluate(tmp_path, tmp_path / "hf", TASKS="report", **settings)
    of_five, of_none, *_ = report.splitlines()
    assert "triviaqa" in of_five
    assert "--num_fewshot 5" in of_five
    assert "arc_challenge" in of_none
    assert "--num_fewshot 0" in of_none
    assert "mbpp_plus" not in report  # it runs what a model has written
    code = evaluate(tmp_path, tmp_path / "hf", TASKS="report", HF_ALLOW_CODE_EVAL="1", **settings)
    assert "mbpp_plus" in code
    assert "--tasks piqa" in evaluate(tmp_path, tmp_path / "hf", TASKS="piqa", **settings)
    assert not (tmp_path / "out").exists()
