"""A run without validation data does not evaluate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_trinity.upstream.registry import Adaptation

ADAPTATION = Adaptation(
    name="absent-validation",
    symbols=("megatron.training.training.build_train_valid_test_data_iterators",),
    reason=(
        "the list of validation loaders counts as validation data even if there is none in it, "
        "and the first evaluation then fails, after as many steps as `--eval-interval`"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`do_valid` is false where the validation dataset is None",
)


def install() -> None:
    """Let the setup ask the ranks for validation data after its iterators are built."""
    from megatron.training import training

    training.build_train_valid_test_data_iterators = _asking(
        training.build_train_valid_test_data_iterators
    )


def _asking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        train, valid, test = original(*args, **kwargs)
        # Ranks in the middle of a pipeline have none. Of virtual stages the last is asked last,
        # and each asks anew.
        found = torch.tensor([valid is not None], dtype=torch.int, device="cuda")
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        get_args().do_valid = bool(get_args().do_valid and found.item())
        return train, valid, test

    return build_train_valid_test_data_iterators
