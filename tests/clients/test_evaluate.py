"""`examples/evaluate.sh` on its local tasks, and its figures."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AfmoeForCausalLM, AutoTokenizer

from tests.clients.exports import CONFIG, LIMIT, offline
from tests.paths import ROOT

ROWS = 2


def evaluate(tmp_path: Path, hf: Path, *flags: str, **settings: str) -> str:
    """What `examples/evaluate.sh` prints, offline."""
    done = subprocess.run(
        ["bash", "examples/evaluate.sh", *flags],
        cwd=ROOT,
        env={**offline(tmp_path), "HF": str(hf), "OUT": str(tmp_path / "out"), **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def log_likelihood(export: Path, text: str) -> float:
    """Of a text behind the eos, each token from as many before it as the model takes or fewer."""
    model, tokenizer = (
        AfmoeForCausalLM.from_pretrained(export),
        AutoTokenizer.from_pretrained(export),
    )
    longest, total = CONFIG.max_position_embeddings, 0.0
    ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
    for start in range(1, len(ids), longest):
        end = min(start + longest, len(ids))
        given = torch.tensor([ids[max(0, end - 1 - longest) : end - 1]])
        with torch.no_grad():
            logits = model(given).logits[0, start - end :].log_softmax(-1)
        total += logits.gather(1, torch.tensor(ids[start:end])[:, None]).sum().item()
    return total


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.usefixtures("clients_python")
def test_local_tasks(exports: Path, tmp_path: Path) -> None:
    evaluate(tmp_path, exports / "fp32", "--limit", str(ROWS), "--device", "cpu")
    [results] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    tasks = tmp_path / "out/tasks"
    texts = [json.loads(line)["text"] for line in (tasks / "stdlib_text.jsonl").open()][:ROWS]
    lost = -sum(log_likelihood(exports / "fp32", text) for text in texts) / math.log(2)
    read = sum(len(text.encode()) for text in texts)
    assert scores["stdlib_text"]["bits_per_byte,none"] == pytest.approx(lost / read, rel=1e-4)

    [samples] = (tmp_path / "out").rglob("samples_stdlib_next_line_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == ROWS
    assert scores["stdlib_next_line"]["acc,none"] == sum(map(right, rows)) / ROWS


def right(row: dict[str, Any]) -> bool:
    found = [float(response[0]) for response in row["filtered_resps"]]
    best: int = found.index(max(found))
    return best == row["doc"]["answer"]


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
