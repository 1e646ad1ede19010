"""Each evaluation sees the same samples, from the first of its dataset on."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="validation-samples",
    symbols=(
        "megatron.training.datasets.data_samplers.build_pretraining_data_loader",
        "megatron.training.training.evaluate",
        "megatron.training.training.get_train_valid_test_num_samples",
    ),
    reason=(
        "each evaluation goes on behind the samples of the one before, in a dataset that is "
        "shuffled as a whole and as large as all evaluations of the run together. What a loss is "
        "measured on so depends on how often the run has evaluated, on `--eval-interval` and on "
        "`--train-iters`; two values of one run cannot be compared, nor those of two runs"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`evaluate` starts its iterators anew, over a dataset of one evaluation's samples",
    after=("data-loader-rng",),
)

_loaders: weakref.WeakSet[EvaluationLoader] = weakref.WeakSet()


class EvaluationLoader:
    """A data loader of validation or test, with one iterator for all evaluations."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        _loaders.add(self)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._loader.batch_sampler.consumed_samples = 0  # the cyclic sampler counts on it
            self._batches = iter(self._loader)
        return next(self._batches)

    def restart(self) -> None:
        """Begin with the first batch again."""
        self._batches = None


def install() -> None:
    """Make loaders of evaluation start anew, and their datasets as large as one evaluation."""
    from megatron.core.datasets.utils import Split
    from megatron.training import training
    from megatron.training.datasets import data_samplers

    build = data_samplers.build_pretraining_data_loader
    count = training.get_train_valid_test_num_samples

    @functools.wraps(build)
    def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> Any:
        split = getattr(dataset, "split", getattr(dataset, "index_split", None))
        if split not in (Split.valid, Split.test):
            return build(dataset, consumed_samples)
        return EvaluationLoader(build(dataset, 0))

    @functools.wraps(count)
    def get_train_valid_test_num_samples() -> tuple[int, int, int]:
        train, _, of_one_evaluation = count()
        return train, of_one_evaluation, of_one_evaluation

    rebind(build, build_pretraining_data_loader)
    rebind(count, get_train_valid_test_num_samples)
    training.evaluate = _from_the_start(training.evaluate)


def _from_the_start(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(evaluate)
    def evaluate_from_the_start(*args: Any, **kwargs: Any) -> Any:
        for loader in _loaders:
            loader.restart()
        return evaluate(*args, **kwargs)

    return evaluate_from_the_start
