"""What Megatron prints is held back; its warnings, and what was asked for, are shown."""

from __future__ import annotations

import builtins
import importlib
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_trinity.upstream.registry import Adaptation

_MODULES = (
    "megatron.training.arguments",
    "megatron.training.async_utils",
    "megatron.training.checkpointing",
    "megatron.training.global_vars",
    "megatron.training.initialize",
    "megatron.training.models.dist_utils",
    "megatron.training.training",
    "megatron.training.utils.common_utils",
    "megatron.core.datasets.blended_megatron_dataset_builder",
)

ADAPTATION = Adaptation(
    name="output",
    symbols=(
        *_MODULES,
        "megatron.training.utils.common_utils.print_rank_0",
        "megatron.training.utils.common_utils.print_rank_last",
    ),
    reason=(
        "a start prints about 900 lines, each argument by itself, and a step 350 characters; none "
        "of it can be turned off"
    ),
    written_for="megatron-core 0.19.2",
    remove_when="Megatron logs through loggers with levels",
)

_OF_OURS = "megatron_trinity"

_WARNS = re.compile(r"\W*(warning|error)\b", re.IGNORECASE)

_EXPECTED = (
    # Said in the table at start: the run begins with new weights.
    "WARNING: could not find the metadata file",
    "    will not load any checkpoints",
)
"""Beginnings of warnings that say nothing new."""

_ASKED = ("Weight hashes", "Total training energy")
"""What flags ask for, and nothing else prints."""


class _Output:
    """Where prints of Megatron go: on the console, into `held`, or nowhere."""

    def __init__(self) -> None:
        self.shown = True
        self.held: list[str] | None = None
        self.asked: tuple[str, ...] = _ASKED

    def print(self, *words: Any, **options: Any) -> None:
        if self.shown or _caller().startswith(_OF_OURS):
            builtins.print(*words, **options)
            return
        text = " ".join(map(str, words))
        if self.held is not None:
            self.held.append(text)
        elif self._is_news(text):
            builtins.print(text, flush=True)

    def _is_news(self, text: str) -> bool:
        if text.startswith(_EXPECTED):
            return False
        return _WARNS.match(text) is not None or any(words in text for words in self.asked)


_output = _Output()


def install() -> None:
    """Give the modules that print a `print` of their own; until it is told otherwise, it prints."""
    for name in _MODULES:
        vars(importlib.import_module(name))["print"] = _output.print


def _caller() -> str:
    """The module that prints, through Megatron's `print_rank_0` or by itself."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("print_rank_0", "print_rank_last") and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


@contextmanager
def megatron_held_back() -> Iterator[None]:
    """Hold back what Megatron prints, until `show_megatron` says what becomes of it."""
    _output.shown, _output.held = False, []
    try:
        yield
    finally:
        _output.shown, _output.held = True, None


def show_megatron(args: Namespace) -> None:
    """Show all of it from now on, and what was held back, with `verbose_log`; else what is news."""
    held, _output.held = _output.held or [], None
    _output.shown = args.verbose_log
    _output.asked = (*_ASKED, *(["memory (MB)"] if args.log_memory_interval else []))
    for text in held:
        if _output.shown or _output._is_news(text):
            builtins.print(text, flush=True)
