"""Each evaluation sees the same samples of each of its sets, from the first on."""

from __future__ import annotations

import functools
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_trinity.upstream.registry import Adaptation, rebind

ADAPTATION = Adaptation(
    name="validation-samples",
    symbols=(
        "megatron.training.datasets.data_samplers.build_pretraining_data_loader",
        "megatron.training.training.evaluate_and_print_results",
        "megatron.training.training.get_train_valid_test_num_samples",
    ),
    reason=(
        "each evaluation goes on behind the samples of the one before, in a dataset that is "
        "shuffled as a whole and as large as all evaluations of the run together. What a loss is "
        "measured on so depends on how often the run has evaluated, on `--eval-interval` and on "
        "`--train-iters`; two values of one run cannot be compared, nor those of two runs. Several "
        "sets are evaluated only as a whole, with `--full-validation`"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="`evaluate` starts its iterators anew, over as many named sets as there are",
    after=("data-loader-rng",),
)


@dataclass(frozen=True)
class EvaluatedSet:
    """Part of what a loader of evaluation gives: `iterations` batches, after those of other sets.

    `name` stands behind the losses' names; it is empty where there is one set. `of_test`: whether
    it is of the test data.
    """

    name: str
    iterations: int
    of_test: bool = False


_loaders: weakref.WeakSet[EvaluationLoader] = weakref.WeakSet()
_sets: dict[bool, Sequence[EvaluatedSet]] = {}
_current: EvaluatedSet | None = None


def set_evaluated_sets(sets: Sequence[EvaluatedSet], of_test: bool) -> None:
    """Say of what the loader of the validation or the test data consists; on every rank."""
    _sets[of_test] = sets


def current_set() -> EvaluatedSet:
    """The set that is being evaluated."""
    return EvaluatedSet("", 0) if _current is None else _current


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
    training.evaluate_and_print_results = _set_by_set(training.evaluate_and_print_results)


def _set_by_set(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def evaluate_and_print_results(
        prefix: str, forward_step_func: Any, data_iterator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        for loader in _loaders:
            loader.restart()
        settings = get_args()
        given = EvaluatedSet("", settings.eval_iters)
        for one in _sets.get(prefix.endswith("on test set"), [given]):
            with _alone(settings, one):
                iterator = [data_iterator] if one.name else data_iterator
                original(prefix, forward_step_func, iterator, *args, **kwargs)

    return evaluate_and_print_results


@contextmanager
def _alone(args: Namespace, one: EvaluatedSet) -> Iterator[None]:
    """Let Megatron evaluate one set, under its name; it takes several as lists of one."""
    global _current
    names = ("multiple_validation_sets", "validation_set_names", "eval_iters")
    kept = {name: getattr(args, name) for name in names}
    values = (True, [one.name], [one.iterations]) if one.name else (False, None, one.iterations)
    vars(args).update(zip(names, values, strict=True))
    _current = one
    try:
        yield
    finally:
        _current = None
        vars(args).update(kept)
