"""What readers of an export other than transformers and vLLM cannot express, from their code."""

from __future__ import annotations

from transformers import AfmoeConfig

from megatron_trinity.checkpoint.hf.mapping import Experts

LLAMA_CPP_GLOBAL_EVERY = 4
"""Which layers are global is written in llama.cpp's model, and in no key of a GGUF file."""


def not_expressed(config: AfmoeConfig, experts: Experts) -> list[str]:
    """What is to be said of a model at its export, a line each.

    Args:
        config: of the model.
        experts: their form in the directory.
    """
    every = config.global_attn_every_n_layers
    found = []
    if every != LLAMA_CPP_GLOBAL_EVERY:
        found.append(
            f"llama.cpp takes every {LLAMA_CPP_GLOBAL_EVERY}th layer for a global one, and this "
            f"model has --global-attn-every-n-layers {every}: it would compute another model"
        )
    if not config.mup_enabled:
        found.append(
            "llama.cpp multiplies the embedding by sqrt(hidden size), and this model does not "
            "(--no-mup-enabled): it would compute another model"
        )
    if every > config.num_hidden_layers:
        found.append("mlx-lm does not load a model without a global layer, as this one is")
    if config.num_experts_per_tok == 1:
        found.append(
            "mlx-lm does not normalise the weight of a single expert (--moe-router-topk 1): it "
            "would compute another model"
        )
    if experts == "fused":
        found.append(
            "llama.cpp, mlx-lm and SGLang read experts as three matrices each, SGLang without a "
            "word; for them leave out --experts fused"
        )
    return found
