"""Which part of a training step is under way, forward and backward."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ACCUMULATES = 2**64 - 1
"""Sequence number of the nodes that add to a parameter's gradient: they belong to none."""


class Places:
    """Knows the part of a step, by its label.

    Forward, a part is what is called between `enter` and `leave`. Backward runs the nodes that
    were made there, in the opposite order of their sequence numbers, so that a number tells where
    its node comes from.
    """

    def __init__(self, label: str) -> None:
        """`label`: of all that is in no part."""
        self._label = self._outside = label
        self._around: list[str] = []
        self._starts: list[int] = []
        self._labels: list[str] = []
        self._newest = label

    def now(self) -> str:
        """The part that runs."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            self._newest = self._label
        elif (number := node._sequence_nr()) != ACCUMULATES:
            index = bisect.bisect_right(self._starts, number) - 1
            self._newest = self._labels[index] if index >= 0 else self._outside
        return self._newest

    def switch(self, label: str) -> None:
        """From here on all is of another part, within the same call."""
        self._label = label
        self._starts.append(torch.autograd._get_sequence_nr())
        self._labels.append(label)

    def enter(self, label: str) -> None:
        """Begin a part."""
        self._around.append(self._label)
        self.switch(label)

    def leave(self) -> None:
        """End the newest part that has begun."""
        self.switch(self._around.pop())

    @contextmanager
    def part(self, label: str) -> Iterator[None]:
        """What runs within is of a part."""
        self.enter(label)
        try:
            yield
        finally:
            self.leave()

    def watch(self, module: nn.Module, label: str) -> None:
        """The calls of a module are a part from now on."""
        module.register_forward_pre_hook(lambda *_: self.enter(label), prepend=True)
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)
