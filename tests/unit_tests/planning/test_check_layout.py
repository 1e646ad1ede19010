"""The command line: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.paths import ROOT

PIPELINE = ("--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout")


def check_layout(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/check_layout.py", *words]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_rank_of_a_layout_of_ones_own() -> None:
    flags = ("--num-layers", "5", *PIPELINE, "Et*3|t*2L", "--micro-batch-size", "1")
    done = check_layout("--preset", "tiny", "--world-size", "4", "--workers", "2", *flags)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 ranks built" in done.stdout
    assert "embedding, 1-3" in done.stdout
    assert "4-5, LM head" in done.stdout
    assert "all right; cover: every value on as many ranks" in done.stdout


def test_a_layout_out_of_balance_fails() -> None:
    flags = (*PIPELINE, "Et*3|tL", "--micro-batch-size", "1")
    done = check_layout("--preset", "tiny", "--world-size", "4", "--sample", "1", *flags)
    assert done.returncode == 1
    assert "2 of 4 ranks built" in done.stdout
    assert "wrong: stage 0 has 1." in done.stdout
    [error] = done.stderr.strip().splitlines()
    assert error.startswith("error: 2 found; tiny on 4: stage 0 has 1.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give --preset and --world-size, or --all"),
        (("--preset", "large"), "give --preset and --world-size, or --all"),
        (("--all", "--preset", "large"), "--all takes every recommended layout"),
        (("--preset", "large", "--world-size", "0"), "--world-size 0: use 1 or more"),
        (("--preset", "large", "--world-size", "7"), "no layout is recommended for large on 7"),
        (("--all", "--sample", "0"), "--sample 0: use 1 or more"),
        (("--all", "--workers", "0"), "--workers 0: use 1 or more"),
        (("--preset", "tiny", "--world-size", "4", "--nonsense"), "--nonsense"),
        (
            ("--preset", "tiny", "--world-size", "4", "--context-parallel-size", "3"),
            "4 ranks cannot be split",
        ),
    ],
)
def test_wrong_usage_is_told_in_one_line(words: tuple[str, ...], says: str) -> None:
    done = check_layout(*words)
    assert done.returncode == 2
    [error] = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert says in error


def test_help_has_an_example() -> None:
    done = check_layout("--help")
    assert done.returncode == 0
    assert "python tools/check_layout.py --preset large --world-size 2048" in done.stdout
