"""Every command that the guide shows would be taken, and runs in a test or says what it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.guide.commands import (
    ENTRY,
    Block,
    WrongCommandError,
    blocks,
    calls,
    check,
    commands,
    parser_of,
    spans,
)
from tests.guide.test_guide import NAME as FIRST_PAGES
from tests.paths import ROOT

NEEDS = {"gpu", "cluster", "network", "minutes", "ci"}
"""What a block may need in the place of a test: minutes of a CPU, as a benchmark does; `ci` is what
continuous integration itself is."""

SHOWN_BY = {
    ENTRY: ("run_trainer", ENTRY, "pretrain("),
    "vllm": ("vllm",),
    "curl": ("vllm_server",),
    "merge_data.py": ("merge_shards",),
    "source": ("",),
}
"""What the file of a test has, one of them, that runs a command; else the stem of the script."""


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.page)
def test_each_command_of_a_block_is_taken(block: Block) -> None:
    for words in commands(block.text):
        check(words)


@pytest.mark.parametrize(("page", "text"), spans(), ids=lambda value: value[:60])
def test_each_command_within_a_line_is_taken(page: str, text: str) -> None:
    for words in commands(text):
        check(words)


SCRIPTS = sorted(
    path
    for folder in ("tools", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "EXAMPLE" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_example_of_a_help_is_taken(script: Path) -> None:
    parser, _ = parser_of(script)
    found = calls(parser.epilog or "")
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.page)
def test_each_block_runs_or_says_what_it_needs(block: Block) -> None:
    assert block.run, f"{block.page}: no `<!-- run: ... -->` ahead of\n{block.text}"
    called = [called_by(words) for words in commands(block.text)]
    for one in block.run:
        if one in NEEDS:
            continue
        file, _, name = one.partition("::")
        assert (ROOT / file).is_file(), one
        text = (ROOT / file).read_text()
        if name:
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), one
    tests = [(ROOT / one.partition("::")[0]).read_text() for one in block.run if one not in NEEDS]
    if tests and FIRST_PAGES not in block.run and not NEEDS & {*block.run}:
        for script in called:
            shown = SHOWN_BY.get(script, (script.removesuffix(".py"),))
            assert any(word in text for text in tests for word in shown), (script, block.run)


def called_by(words: list[str]) -> str:
    """The name of the script, or of the program, that a command is about."""
    names = [word.rpartition("/")[2] for word in words if word.endswith((".py", ".sh", ".sbatch"))]
    return names[0] if names else words[0]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python tools/none.py", "there is no tools/none.py"),
        ("python tools/export_hf.py --load a", "--hf"),
        ("python tools/export_hf.py --load a ...", None),
        ("python tools/export_hf.py --load a --hf b --speed", "unrecognized arguments: --speed"),
        ("python tools/export_hf.py --load a --hf b [--dtype fp8]", "invalid choice: 'fp8'"),
        ("torchrun train.py", "torchrun without"),
        ("torchrun --processes 2 pretrain_trinity.py", "--processes"),
        ("torchrun pretrain_trinity.py --sliding-windows 3", "--sliding-windows"),
        ("torchrun pretrain_trinity.py --sliding-window big", "invalid int value: 'big'"),
        ("torchrun pretrain_trinity.py --rotary-percent 0.5", "is refused"),
        ("bash examples/none.sh", "there is no"),
        ("bash tests/run.sh --quickly", None),
        ("bash tests/run_gpu.sh --quickly", "knows nothing of --quickly"),
        ("sbatch --array=1-3 examples/trinity_nano/04_pretrain_slurm.sbatch --lr 1", None),
        ("python tools/check_layout.py --all --lr 1", None),
        ("python tools/check_layout.py --all --learn 1", "unrecognized arguments: --learn 1"),
        ("python -m tests.none", "there is no tests.none"),
        ("megatron train", "no program"),
    ],
)
def test_a_wrong_command_is_found(command: str, error: str | None) -> None:
    [words] = commands(command)
    if error is None:
        check(words)
        return
    with pytest.raises(WrongCommandError) as told:
        check(words)
    assert error in str(told.value)
