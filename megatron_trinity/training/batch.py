"""One micro-batch, on the ranks that need it.

Shapes: b micro-batch, s sequence length (divided by the context-parallel size where it is above 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from torch import Tensor

from megatron_trinity.data.datasets import pipeline_ends, stage_reads
from megatron_trinity.model.documents import Documents

KEYS = ("tokens", "labels", "loss_mask", "position_ids")
DOCUMENT_KEYS = ("cu_seqlens", "max_seqlen")


def next_batch(
    data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None
) -> dict[str, Any]:
    """Take a micro-batch from the iterator of tensor-parallel rank 0 and share it with its group.

    Args:
        data_iterator: gives `tokens`, `labels`, `position_ids` and `loss_mask`, and with
            intra-document masking `cu_seqlens` and `max_seqlen`; unused elsewhere.
        vp_stage: number of the virtual pipeline stage, if there are any.
    Returns: `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (fp32), each `[b, s]`; None
        where this pipeline stage has no use for it. `documents` on every stage, of the whole
        sequences; None without intra-document masking.
    """
    args = get_args()
    masking = args.dataloader_inter_document_masking
    if not stage_reads(vp_stage, masking):
        return dict.fromkeys((*KEYS, "documents"))
    first, last = pipeline_ends(vp_stage)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        if data_iterator is None:
            raise RuntimeError("tensor-parallel rank 0 of this pipeline stage has no data")
        sample = next(data_iterator)
        keys = (*KEYS, *DOCUMENT_KEYS) if masking else KEYS
        batch = {key: sample[key].cuda(non_blocking=True) for key in keys}
        batch["cu_seqlens_padded"] = None  # documents are not padded for context parallelism
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=masking,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=_micro_batch_size(args),
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    documents = None
    if masking:
        documents = Documents.from_cu_seqlens(
            batch["cu_seqlens"], args.seq_length, padded=args.padded_rows
        )
    group = parallel_state.get_context_parallel_group()
    parts = get_batch_on_this_cp_rank(
        {key: batch[key] for key in KEYS}, is_hybrid_cp=False, cp_group=group
    )
    return {**parts, "documents": documents}


def _micro_batch_size(args: Any) -> int:
    size: int = args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size
    return size
