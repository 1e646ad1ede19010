"""The datasets that Megatron's loaders read, from the description of a run."""

from __future__ import annotations

from argparse import Namespace
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.training import get_args, get_tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from megatron_trinity.data.dali import DaliLoader
from megatron_trinity.data.evaluation import EvaluationSamples
from megatron_trinity.data.mock_documents import MockDocumentDataset
from megatron_trinity.data.plan import Plan
from megatron_trinity.data.run_data import RunData
from megatron_trinity.data.samples import SampleFormat
from megatron_trinity.upstream.data_loader_rng import set_training_loader
from megatron_trinity.upstream.validation_samples import EvaluatedSet, set_evaluated_sets

ENDLESS = 1 << 62
"""Length of the training data: how long a run is does not concern it."""


class TrainingDataset(Dataset[dict[str, Tensor]]):
    """Every sample of a run by its number; the sampler asks from the consumed ones on."""

    split = Split.train

    def __init__(self, plan: Plan, layout: SampleFormat) -> None:
        self._plan, self._layout = plan, layout

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        return self._layout.sample(*self._plan.pieces(sample))


class EvaluationDataset(Dataset[dict[str, Tensor]]):
    """Sets one behind the other, each filled up to whole batches with samples without a loss."""

    def __init__(
        self, split: Split, sets: Sequence[EvaluationSamples], batch: int, layout: SampleFormat
    ) -> None:
        self.split = split
        self._sets, self._layout = sets, layout
        self._ends = list(accumulate(one.iterations * batch for one in sets))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        number = bisect_right(self._ends, sample)
        index = sample - (self._ends[number - 1] if number else 0)
        one = self._sets[number]
        if index >= one.samples:
            return self._layout.padding()
        return self._layout.sample(*one.pieces(index))


Provider = Callable[..., tuple[Any, Any, Any]]


def dataset_provider(data: RunData | None) -> Provider:
    """What Megatron calls for its datasets, on every rank, once a virtual stage; None for mock."""
    build = _mock_datasets if data is None else partial(_datasets, data)

    def train_valid_test_datasets(
        num_samples: Sequence[int | None], vp_stage: int | None = None
    ) -> tuple[Any, Any, Any]:
        return build(num_samples, vp_stage)

    # Megatron then calls it on every rank and leaves the choice of ranks to `_this_rank_reads`.
    train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]
    return train_valid_test_datasets


def _datasets(
    data: RunData, num_samples: Sequence[int | None], vp_stage: int | None
) -> tuple[Any, Any, Any]:
    args = get_args()
    for of_test, sets in enumerate((data.validation, data.test)):
        set_evaluated_sets(
            [EvaluatedSet(one.name, one.iterations, bool(of_test)) for one in sets], bool(of_test)
        )
    if not _this_rank_reads(vp_stage, args.dataloader_inter_document_masking):
        return None, None, None
    layout = sample_format(args)
    set_training_loader(partial(_dali_loader, args) if args.dali else None)
    train = TrainingDataset(data.plan, layout) if data.plan is not None else None
    valid, test = (
        EvaluationDataset(split, sets, args.eval_global_batch_size, layout) if sets else None
        for split, sets in ((Split.valid, data.validation), (Split.test, data.test))
    )
    return train, valid, test


def _dali_loader(args: Namespace, dataset: TrainingDataset, consumed_samples: int) -> DaliLoader:
    return DaliLoader(
        dataset,
        consumed_samples,
        args.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        device=torch.cuda.current_device() if torch.cuda.is_available() else None,
    )


def sample_format(args: Namespace) -> SampleFormat:
    """How the samples of a run are made."""
    tokenizer = get_tokenizer()
    end, padding = tokenizer.eod, getattr(tokenizer, "pad", None)
    return SampleFormat(
        seq_length=args.seq_length,
        vocab_size=args.vocab_size,
        masking=args.dataloader_inter_document_masking,
        unseen_labels=() if padding is None or padding in (end, -1) else (padding,),
        unseen_tokens=(end,) if args.eod_mask_loss else (),
    )


def _mock_datasets(num_samples: Sequence[int | None], vp_stage: int | None) -> tuple[Any, Any, Any]:
    """Megatron's random documents, for measuring speed."""
    args = get_args()
    for of_test in (False, True):
        set_evaluated_sets([EvaluatedSet("", args.eval_iters)], of_test)
    masking = args.dataloader_inter_document_masking
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=masking,
        split="1,1,1",
    )
    builder = BlendedMegatronDatasetBuilder(
        MockDocumentDataset if masking else MockGPTDataset,
        list(num_samples),
        partial(_this_rank_reads, vp_stage, masking),
        config,
    )
    train, valid, test = builder.build()
    return train, valid, test


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
