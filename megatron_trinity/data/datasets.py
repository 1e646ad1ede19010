"""Megatron's GPT datasets from the command line's data paths."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_trinity.data.document_dataset import DocumentDataset, MockDocumentDataset


def train_valid_test_datasets(
    num_samples: Sequence[int | None], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the three splits; Megatron calls it on every rank, once a virtual stage.

    Args:
        num_samples: how many samples of each split the run needs; None for one pass over it.
        vp_stage: number of the virtual pipeline stage, if there are any.
    """
    args = get_args()
    masking = args.dataloader_inter_document_masking
    dataset_type = DocumentDataset if masking else GPTDataset
    if args.mock_data:
        dataset_type = MockDocumentDataset if masking else MockGPTDataset
    builder = BlendedMegatronDatasetBuilder(
        dataset_type,
        list(num_samples),
        partial(_this_rank_reads, vp_stage, masking),
        _dataset_config(args),
    )
    train, valid, test = builder.build()
    return train, valid, test


# Megatron then calls it on every rank and leaves the choice of ranks to `_this_rank_reads`.
train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def pipeline_ends(vp_stage: int | None) -> tuple[bool, bool]:
    """Whether a stage has the embedding, and whether it has the LM head."""
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )


def stage_reads(vp_stage: int | None, masking: bool) -> bool:
    """Whether a stage needs data: tokens or labels at the ends, documents everywhere."""
    return masking or any(pipeline_ends(vp_stage))


def _this_rank_reads(vp_stage: int | None, masking: bool) -> bool:
    """Tensor-parallel rank 0 of the stages that need data reads; `training.batch` shares it."""
    return stage_reads(vp_stage, masking) and parallel_state.get_tensor_model_parallel_rank() == 0
