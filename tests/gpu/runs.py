"""Runs of the real trainer, a process each, on a small model over data that can be learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.gpu.children import failure_of
from tests.gpu.machine import TOY_SIZES, Machine

Steps = dict[int, str]
"""Iteration to its losses and gradient norm in hexadecimal."""


class RefusedError(Exception):
    """A run that this machine cannot make."""


@dataclass(frozen=True)
class Runs:
    """A folder of runs over the same data.

    Attributes:
        folder: of the data, and what runs save.
    """

    machine: Machine
    folder: Path

    def train(self, name: str, *flags: str) -> Steps:
        """Steps that a run took, whatever it was called before.

        Raises:
            RefusedError: this machine cannot; with the reason.
            RuntimeError: it failed; with its last line.
        """
        file, log = self.folder / f"{name}.steps", self.folder / f"{name}.log"
        words = ["-m", "tests.gpu.train", str(file), *self._flags(), *flags]
        if (failure := failure_of(words, log)) is not None:
            if failure.refused:
                raise RefusedError(failure.told)
            raise RuntimeError(f"the run {name} failed: {failure.told}")
        return steps_of(file)

    def _flags(self) -> list[str]:
        """Widths that kernels for tiles of 16 and FP8 blocks of 128 can take."""
        sizes = self.machine.size(
            {"hidden-size": 256, "num-attention-heads": 8, "kv-channels": 32, "seq-length": 256},
            {**TOY_SIZES, "global-batch-size": 4},
        )
        options = {
            "preset": "tiny",
            **sizes,
            "tokenizer-type": "NullTokenizer",
            "train-data-path": self.folder / "data",
            "valid-data-path": self.folder / "data",
            "lr-warmup-iters": 2,
            "eval-iters": 1,
            "eval-interval": 100000,
            "log-interval": 1,
            "num-workers": 0,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*words, "--bf16"]


@contextmanager
def runs(machine: Machine) -> Iterator[Runs]:
    """A folder with data; gone afterwards."""
    from megatron_trinity.upstream import adapt_megatron

    adapt_megatron()

    from tests.trainer import write_dataset

    with TemporaryDirectory() as scratch:
        write_dataset(Path(scratch) / "data", documents=machine.size(20000, 120))
        yield Runs(machine, Path(scratch))


def steps_of(file: Path) -> Steps:
    from tests.steps import recorded

    return dict(recorded(file))


def loss_of(step: str) -> float:
    """The language model's loss among the losses of a step."""
    return float.fromhex(step.split(" ")[0].split(",")[0])


def unlike(one: Steps, other: Steps) -> int:
    """Steps of the second that are not those of the first, bit by bit, or are not there."""
    return sum(one.get(number) != values for number, values in other.items())


def apart(one: Steps, other: Steps) -> float:
    """The largest difference of losses, relative."""
    if one.keys() != other.keys() or not one:
        return float("nan")
    losses = [(loss_of(one[number]), loss_of(other[number])) for number in one]
    return max(abs(a - b) / abs(a) for a, b in losses)
