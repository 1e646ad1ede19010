"""Is an exported directory the model that was exported? Logits of transformers and of Megatron.

Both run in fp32 on the CPU, one after the other; Megatron's loader reads the checkpoint, so nothing
that the export did is used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trinity.checkpoint.hf.config import args_from_hf_config, hf_config_from_args
from megatron_trinity.checkpoint.hf.files import TOKENIZER_CONFIG
from megatron_trinity.checkpoint.hf.mapping import EMBEDDING
from megatron_trinity.checkpoint.hf.safetensors_files import parse_json
from megatron_trinity.checkpoint.torch_dist.read import TorchDistCheckpoint
from megatron_trinity.errors import TrinityError, UsageError

PROMPTS = ("The sky over the harbour was", "def mean(values):\n    return")
TOKENS = 32
"""Of the one prompt of a directory without a tokenizer."""


@dataclass(frozen=True)
class Agreement:
    """How near two models are, over all prompts.

    Attributes:
        tokens: whose next tokens were predicted.
        difference: largest absolute difference of two logits.
        same_top: share of the tokens for which both models think the same next token likeliest.
    """

    tokens: int
    difference: float
    same_top: float


def verify_export(load: Path, hf: Path, prompts: Sequence[str] = ()) -> Agreement:
    """Compare the model in the directory `hf` with the one in the checkpoint `load`.

    Args:
        prompts: texts, by default two short ones, or some token ids where there is no tokenizer.

    Raises:
        UsageError: prompts are given, and there is no tokenizer.
        TrinityError: the directory is quantised, or transformers does not find each of its tensors.
    """
    if "quantization_config" in parse_json(hf / "config.json"):
        raise TrinityError(f"{hf} is quantised; --verify compares weights as they are")
    checkpoint = TorchDistCheckpoint(load)
    ids = _token_ids(hf, prompts, checkpoint.args.vocab_size)
    theirs = _logits_of_transformers(hf, ids)
    ours = _logits_of_megatron(checkpoint, ids)
    pairs = [(a[..., : b.shape[-1]], b) for a, b in zip(ours, theirs, strict=True)]
    differences = [(a - b).abs().max().item() for a, b in pairs]
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
    return Agreement(len(same), max(differences), same.float().mean().item())


def _token_ids(hf: Path, prompts: Sequence[str], vocab_size: int) -> list[Tensor]:
    """`[1, s]` for each prompt."""
    if not (hf / TOKENIZER_CONFIG).is_file():
        if prompts:
            raise UsageError(f"{hf} has no tokenizer for --prompt; leave it out")
        return [(torch.arange(TOKENS) * 7919 % vocab_size)[None]]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    return [tokenizer(text, return_tensors="pt").input_ids for text in prompts or PROMPTS]


def _logits_of_transformers(hf: Path, ids: Sequence[Tensor]) -> list[Tensor]:
    from transformers import AfmoeForCausalLM

    model, report = AfmoeForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind, names in report.items():
        if names:
            raise TrinityError(f"transformers finds {kind.replace('_', ' ')} in {hf}: {names}")
    with torch.no_grad():
        return [model.eval()(tokens).logits for tokens in ids]


def _logits_of_megatron(checkpoint: TorchDistCheckpoint, ids: Sequence[Tensor]) -> list[Tensor]:
    from megatron.core import dist_checkpointing, parallel_state

    try:
        model = _build(checkpoint)
        sharded = model.sharded_state_dict()
        state = dist_checkpointing.load(dict(sharded), str(checkpoint.path))
        model.load_state_dict({name: state[name] for name in sharded})
        with torch.no_grad():
            return [
                model.eval()(tokens, torch.arange(tokens.shape[1])[None], None) for tokens in ids
            ]
    finally:
        parallel_state.destroy_model_parallel()


def _build(checkpoint: TorchDistCheckpoint) -> Any:
    """The checkpoint's model in fp32, whole on this one process."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_trinity.model.builder import TrinityModelBuilder
    from megatron_trinity.model.config import model_config_from_args

    args = args_from_hf_config(hf_config_from_args(checkpoint.args))
    args.padded_vocab_size = checkpoint.shape(EMBEDDING)[0]
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return TrinityModelBuilder(model_config_from_args(args)).build_model(groups)
