"""vLLM's server gives the tokens of an exported directory that transformers gives.

Answers are judged by transformers in fp32: the probabilities of the tokens, and that none was a
likelier one by more than the tolerance allows. What is stored in FP8 is dequantised for it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AfmoeForCausalLM, AutoTokenizer

from megatron_trinity.data.tokenizer import save_tokenizer, train_tokenizer
from tests.afmoe import dequantized, random_tensors, write_afmoe
from tests.clients.vllm_server import Answer, serve
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

VOCABULARY = 300
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "head_dim": 32}
CONFIGS = {
    # Blocks of 128 fit into every matrix that vLLM merges.
    "blocks": afmoe_config(
        **SIZES,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    # They fit into none.
    "rows": afmoe_config(
        **SIZES,
        hidden_size=208,
        intermediate_size=240,
        moe_intermediate_size=112,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}
TEXT = "the sky over the harbour was grey, and def mean(values): return sum(values)\n" * 3
PROMPTS = [
    [7, 31, 250, 11, 90, 42, 199, 64, 5, 120, 77, 288, 16],  # longer than the window of 7
    [291, 9, 9, 138],
    list(range(100, 180, 4)),
]
TOKENS = 24
TOLERANCE = 0.25
"""Of a log-probability in nats, where something computes in less than fp32."""
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("blocks", {"dtype": "fp32"}),
    "bf16": ("blocks", {"dtype": "bf16"}),
    "fp8-blocks": ("blocks", {"dtype": "bf16", "fp8": "block"}),
    "fp8-rows": ("rows", {"dtype": "bf16", "fp8": "compressed-tensors"}),
}
"""Name of a directory to the checkpoint it is of, and how it is exported."""


def export_all(rank: int, world_size: int, root: Path) -> None:
    """A Megatron checkpoint of each of `CONFIGS`, and `EXPORTS` of those."""
    from megatron_trinity.checkpoint.hf.export_hf import export_hf
    from megatron_trinity.checkpoint.hf.import_hf import import_hf

    for name in CONFIGS:
        import_hf(root / name, root / f"megatron-{name}")
    for name, (checkpoint, options) in EXPORTS.items():
        load = root / f"megatron-{checkpoint}"
        export_hf(load, root / name, tokenizer=root / "tokenizer", **options)


@pytest.fixture(scope="module")
def root(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has directories by the names of `CONFIGS`, in fp32, and by those of `EXPORTS`."""
    root = tmp_path_factory.mktemp("vllm")
    (root / "tokenizer").mkdir()
    save_tokenizer(train_tokenizer([TEXT], VOCABULARY), root / "tokenizer")
    for name, config in CONFIGS.items():
        tensors = random_tensors(config, torch.float32)
        # Logits far apart: with the small ones of random weights the next token is nearly a tie.
        tensors["lm_head.weight"] *= 5
        write_afmoe(root / name, config, tensors)
    ranks.run(export_all, root, world_size=1, timeout=300)
    return root


def model_of(directory: Path) -> AfmoeForCausalLM:
    """In fp32, of a directory that is not in FP8."""
    return AfmoeForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def dequantized_model(root: Path, name: str, suffix: str, work: Path) -> AfmoeForCausalLM:
    """In fp32, of one of `EXPORTS` in FP8, whose scales are named so."""
    tensors = dequantized(load_file(root / name / "model.safetensors"), suffix)
    return model_of(write_afmoe(work / "dequantized", CONFIGS[EXPORTS[name][0]], tensors))


def logits_of(model: AfmoeForCausalLM, answer: Answer) -> Tensor:
    """`[tokens of the answer, vocabulary]`: from which each was chosen."""
    ids = torch.tensor([[*answer.prompt, *answer.tokens]])
    with torch.no_grad():
        logits: Tensor = model(ids).logits[0, len(answer.prompt) - 1 : -1]
    return logits


def differences(answers: Sequence[Answer], logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How far vLLM's log-probabilities are from those of `logits`, and its tokens from the best."""
    apart, behind = [], []
    for answer, expected in zip(answers, logits, strict=True):
        logprobs = expected.log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        apart.append((chosen - torch.tensor(answer.logprobs)).abs())
        behind.append(logprobs.amax(-1) - chosen)
    return torch.cat(apart), torch.cat(behind)


def assert_varied(answers: Sequence[Answer]) -> None:
    assert [len(answer.tokens) for answer in answers] == [TOKENS] * len(PROMPTS)
    assert [list(answer.prompt) for answer in answers] == PROMPTS
    for answer in answers:
        assert len(set(answer.tokens)) > TOKENS // 2, "a model of one answer shows nothing"


def test_fp32_gives_the_tokens_of_transformers(
    vllm_python: Path, root: Path, tmp_path: Path
) -> None:
    text = "the sky over the harbour"
    with serve(vllm_python, root / "fp32", tmp_path, "float32") as server:
        answers = server.complete(PROMPTS, TOKENS)
        [of_text] = server.complete([text], TOKENS)
    assert_varied(answers)
    tokenizer = AutoTokenizer.from_pretrained(root / "fp32")
    assert list(of_text.prompt) == tokenizer(text).input_ids
    model = model_of(root / "fp32")
    for answer in (*answers, of_text):
        ids = torch.tensor([answer.prompt])
        found = model.generate(
            ids, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, eos_token_id=None
        )
        assert tuple(found[0, ids.shape[1] :].tolist()) == answer.tokens
    apart, _ = differences(answers, [logits_of(model, answer) for answer in answers])
    assert apart.max() <= 1e-3


def assert_near(answers: Sequence[Answer], logits: Sequence[Tensor]) -> None:
    """Most tokens are as `logits` say, to the rounding of bf16 or e4m3.

    Largest logits are 16 or so, where half a step of bf16 is 0.06; the layers before add as much
    again, and inputs in e4m3 a little more. Not all tokens: where two experts are nearly tied a
    rounding sends a token to the other one, which moves it by whole nats (in transformers too, when
    it computes in bf16).
    """
    apart, behind = differences(answers, logits)
    near = (apart <= TOLERANCE) & (behind <= 2 * TOLERANCE)
    assert near.float().mean() >= 0.75, apart.sort().values


def assert_further(answers: Sequence[Answer], logits: Sequence[Tensor], other: Path) -> None:
    """What FP8 stands for explains the answers better than what it was made from."""
    apart, _ = differences(answers, logits)
    model = model_of(other)
    further, _ = differences(answers, [logits_of(model, answer) for answer in answers])
    assert 2 * apart.median() <= further.median()


def test_bf16(vllm_python: Path, root: Path, tmp_path: Path) -> None:
    with serve(vllm_python, root / "bf16", tmp_path, "bfloat16") as server:
        answers = server.complete(PROMPTS, TOKENS)
    assert_varied(answers)
    model = model_of(root / "bf16")
    assert_near(answers, [logits_of(model, answer) for answer in answers])


def test_fp8_by_blocks(vllm_python: Path, root: Path, tmp_path: Path) -> None:
    with serve(vllm_python, root / "fp8-blocks", tmp_path, "bfloat16") as server:
        answers = server.complete(PROMPTS, TOKENS)
    assert_varied(answers)
    model = dequantized_model(root, "fp8-blocks", "_scale_inv", tmp_path)
    logits = [logits_of(model, answer) for answer in answers]
    assert_near(answers, logits)
    assert_further(answers, logits, root / "blocks")


def test_fp8_of_compressed_tensors(vllm_python: Path, root: Path, tmp_path: Path) -> None:
    directory = root / "fp8-rows"
    with serve(vllm_python, directory, tmp_path, "float32") as server:
        answers = server.complete(PROMPTS, TOKENS)
    assert_varied(answers)
    found = read_by_the_library(vllm_python, directory, answers, tmp_path)
    model = dequantized_model(root, "fp8-rows", "_scale", tmp_path)
    for name, tensor in model.state_dict().items():
        # transformers leaves experts in the type of their scales.
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    logits = [
        found[f"logits.{number}"][len(answer.prompt) - 1 : -1]
        for number, answer in enumerate(answers)
    ]
    assert_near(answers, logits)
    assert_further(answers, logits, root / "rows")


def read_by_the_library(
    python: Path, directory: Path, answers: Sequence[Answer], work: Path
) -> dict[str, Tensor]:
    """Weights and logits, as `read_compressed.py` writes them."""
    sequences = work / "sequences.json"
    sequences.write_text(json.dumps([[*answer.prompt, *answer.tokens] for answer in answers]))
    script = Path(__file__).with_name("read_compressed.py")
    command = [python, script, directory, sequences, work / "read.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return load_file(work / "read.safetensors")
