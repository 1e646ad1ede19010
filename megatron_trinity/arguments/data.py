"""Data: what of Megatron's ways to mask, pack and evaluate is refused."""

from __future__ import annotations

from megatron_trinity.arguments.refusal import Refusal

DATA_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "full-validation",
        lambda a: a.full_validation,
        "{--full-validation} fails in megatron-core 0.19.2 when there is one validation set; use "
        "{--eval-iters}",
    ),
    Refusal(
        "document-mask",
        lambda a: a.reset_attention_mask,
        "{--reset-attention-mask} makes a mask of every pair of tokens, which the core attention "
        "does not take; use {--dataloader-inter-document-masking}",
    ),
    Refusal(
        "document-positions",
        lambda a: a.reset_position_ids,
        "{--reset-position-ids} would change nothing: RoPE is relative; leave it out, and use "
        "{--dataloader-inter-document-masking} to keep documents apart",
    ),
    Refusal(
        "sft",
        lambda a: a.sft,
        "{--sft} packs conversations in a way that Trinity's batches do not know; leave it out",
    ),
    Refusal(
        "attention-mask",
        lambda a: a.create_attention_mask_in_dataloader,
        "the core attention takes no mask tensor; use {--no-create-attention-mask-in-dataloader}",
    ),
)
