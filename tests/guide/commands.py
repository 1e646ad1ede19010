"""The commands that the guide shows: found, taken apart, and held to the parsers they are for."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import re
import runpy
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from tests.paths import ROOT

ENTRY = "pretrain_trinity.py"
PASSED_ON = '"$@"'
ELSEWHERE = ("curl", "pip", "pre-commit", "pytest", "source", "vllm")
"""Programs that are not the project's."""

_BLOCK = re.compile(r"(?:^<!-- run: ([^\n]+) -->\n)?^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CALL = r"(?:[A-Z_]+=\S+ )*(?:python|bash|torchrun|sbatch) "
_SPAN = re.compile(rf"`({_CALL}[^`]*(?:\.py|\.sh|\.sbatch|-m )[^`]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of commands.

    Attributes:
        page: its file, as from the project's root.
        run: what the comment ahead of it says: the tests that run it, or what it needs.
        text: as it stands there.
    """

    page: str
    run: tuple[str, ...]
    text: str


def pages() -> list[Path]:
    """Every page that shows commands."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks() -> list[Block]:
    """Those of all pages, in the order of a page."""
    return [
        Block(str(page.relative_to(ROOT)), tuple(run.split(", ")) if run else (), text)
        for page in pages()
        for run, text in _BLOCK.findall(page.read_text())
    ]


def spans() -> list[tuple[str, str]]:
    """Page and text of each command within a line."""
    return [
        (str(page.relative_to(ROOT)), text.replace("\n", " "))
        for page in pages()
        for text in _SPAN.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))
    ]


def commands(text: str) -> list[list[str]]:
    """The words of each command, comments left out."""
    split = (shlex.split(line, comments=True) for line in _lines(text))
    return [words for words in split if words]


def calls(text: str) -> list[list[str]]:
    """The words of each line that calls a program of the project, among prose."""
    return [shlex.split(line) for line in _lines(text) if re.match(_CALL, line.strip())]


def _lines(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", text).splitlines()


class WrongCommandError(Exception):
    """A command that would not be taken."""


def check(words: Sequence[str]) -> None:
    """Hold a command to what it calls.

    `...` stands for what is left out, and brackets for what may be; `[--flag VALUE]` is checked.

    Raises:
        WrongCommandError: the script is not there, or would refuse the words.
    """
    complete = "..." not in words
    bare = [word.strip("[]") for word in words if word != "..."]
    while re.match(r"[A-Z_]+=", bare[0]):
        bare = bare[1:]
    program, rest = bare[0], bare[1:]
    if program in ("python", "python3"):
        _check_python(rest, complete)
    elif program == "torchrun":
        _check_launch(rest)
    elif program in ("bash", "sbatch"):
        _check_script(list(itertools.dropwhile(lambda word: word.startswith("--"), rest)))
    elif program not in ELSEWHERE:
        raise WrongCommandError(f"{program}: no program that the guide knows")


def _check_python(words: Sequence[str], complete: bool) -> None:
    if words[0] == "-m":
        module = ROOT / words[1].replace(".", "/")
        if words[1].partition(".")[0] not in ("tests", "megatron_trinity"):
            return
        file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        words = words[1:]
    else:
        file = ROOT / words[0]
    if not file.is_file():
        raise WrongCommandError(f"there is no {words[0]}")
    if file.name == ENTRY:
        _check_trainer(words[1:])
    elif words[1:]:
        parser, passes_on = parser_of(file)
        unknown = _parse(parser, words[1:], complete)
        if passes_on:
            _check_trainer(unknown)
        else:
            _refuse(unknown)


def _check_launch(words: Sequence[str]) -> None:
    if ENTRY not in words:
        raise WrongCommandError(f"torchrun without {ENTRY}")
    from torch.distributed.run import get_args_parser

    cut = words.index(ENTRY)
    _refuse(_parse(get_args_parser(), words[: cut + 1], complete=True))
    _check_trainer(words[cut + 1 :])


def _check_trainer(words: Sequence[str]) -> None:
    from megatron_trinity.arguments.verdicts.table import refused

    _refuse(_parse(_trainer_parser(), words, complete=True))
    reasons = dict(refused())
    for word in words:
        if word in reasons:
            raise WrongCommandError(f"{word} is refused: {reasons[word]}")


def _check_script(words: Sequence[str]) -> None:
    file = ROOT / words[0]
    if not file.is_file():
        raise WrongCommandError(f"there is no {words[0]}")
    text = file.read_text()
    for word in words[1:]:
        if word.startswith("--") and word not in text and PASSED_ON not in text:
            raise WrongCommandError(f"{words[0]} knows nothing of {word}")


@functools.cache
def _trainer_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_trinity.arguments.parse import standard_parser

    return standard_parser(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


class _Reached(Exception):
    """A script has made its parser."""


@functools.cache
def parser_of(script: Path) -> tuple[argparse.ArgumentParser, bool]:
    """The parser that a script makes in its `main`, and whether it passes flags on to training."""
    made: list[tuple[argparse.ArgumentParser, bool]] = []

    def stop(passes_on: bool) -> Callable[..., NoReturn]:
        def stopped(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
            made.append((parser, passes_on))
            raise _Reached

        return stopped

    main = runpy.run_path(str(script), run_name=script.stem)["main"]
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop(False)),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop(True)),
        contextlib.suppress(_Reached),
    ):
        main()
    return made[0]


def _parse(parser: argparse.ArgumentParser, words: Sequence[str], complete: bool) -> list[str]:
    """Returns: the words that it does not know."""
    told = io.StringIO()
    required = [action for action in _actions(parser) if action.required]
    for action in required:
        action.required = complete
    try:
        with contextlib.redirect_stderr(told):
            return parser.parse_known_args(words)[1]
    except SystemExit as exit_:
        if exit_.code:
            raise WrongCommandError(told.getvalue().strip().splitlines()[-1]) from exit_
        return []
    finally:
        for action in required:
            action.required = True


def _refuse(unknown: Sequence[str]) -> None:
    if unknown:
        raise WrongCommandError(f"unrecognized arguments: {' '.join(unknown)}")


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    yield from parser._actions
    yield from parser._mutually_exclusive_groups
