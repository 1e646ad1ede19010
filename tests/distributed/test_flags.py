"""Every flag of Megatron has a verdict, and the verdict is true.

Those that work or change nothing are tried for a few steps each on ranks: with `works` losses and
gradient norms differ from those without the flag, with `same answer` they do not.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_trinity.arguments.parse import standard_parser
from megatron_trinity.arguments.verdicts.table import (
    Example,
    needs_cuda,
    off_standard,
    refuse_flags,
    refused,
    same_answer,
    standard_values,
    works,
)
from megatron_trinity.errors import UsageError
from tests.crosses import first
from tests.distributed.pool import RankPools
from tests.paths import ROOT
from tests.steps import recorded, run_recorded
from tests.trainer import training_flags, write_dataset

STEPS = 4
SAME = 1e-5
"""Relative: a layout or another order of sums, in fp32."""

HALF = 5e-3
"""The same where another loss scale rounds other gradients to zero."""

Steps = dict[int, list[float]]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return standard_parser(add_megatron_arguments(argparse.ArgumentParser()))


@pytest.fixture(scope="module")
def megatron_flags() -> list[list[str]]:
    """The names of each of Megatron's own flags."""
    from megatron.training.arguments import add_megatron_arguments

    actions = add_megatron_arguments(argparse.ArgumentParser())._actions
    return [list(a.option_strings) for a in actions if a.option_strings and a.dest != "help"]


def test_every_flag_has_one_verdict(megatron_flags: list[list[str]]) -> None:
    judged = Counter(flag for flag, _ in (*refused(), *needs_cuda()))
    judged.update(example.flag for example in (*works(), *same_answer()))
    assert [flag for flag, count in judged.items() if count > 1] == []
    names = {names[0] for names in megatron_flags}
    assert sorted(names - set(judged)) == [], "flags without a verdict"
    assert sorted(set(judged) - names) == [], "verdicts on flags that there are not"


def test_what_an_example_is_shown_by_is_there() -> None:
    shown = [e.shown_by for e in (*works(), *same_answer()) if e.shown_by is not None]
    assert [test for test in shown if not (ROOT / test).is_file()] == []


def test_nothing_given_is_off_its_standard(parser: argparse.ArgumentParser) -> None:
    assert off_standard(parser.parse_args([]), standard_values(parser)) == set()


def test_each_refused_flag_is_seen_and_named(parser: argparse.ArgumentParser) -> None:
    standard = standard_values(parser)
    for flag, reason in refused():
        args = parser.parse_args([])
        setattr(args, standard[flag][0], "another value")
        # A second name, or a switch for each way, may share the argument.
        given = off_standard(args, standard)
        assert flag in given
        with pytest.raises(UsageError) as told:
            refuse_flags({flag}, cuda_available=True, ruled=set())
        assert str(told.value) == f"{flag} is refused: {reason}; leave it out"
    for flag, _ in needs_cuda():
        refuse_flags({flag}, cuda_available=True, ruled=set())
        with pytest.raises(UsageError, match=f"^{flag} needs CUDA"):
            refuse_flags({flag}, cuda_available=False, ruled=set())


PASTED = [
    (["--rampup-batch-size", "2", "2", "16"], "--step-batch-size-schedule"),
    (["--apply-layernorm-1p"], "RMSNorm"),
    (["--normalization", "LayerNorm"], "RMSNorm"),
    (["--qk-l2-norm"], "softmax"),
    (["--softmax-type", "learnable"], "softmax"),
    (["--use-rope-scaling"], "RoPE"),
    (["--rotary-scaling-factor", "2"], "latent attention"),
    (["--rotary-seq-len-interpolation-factor", "2"], "RoPE"),
    (["--rotary-percent", "0.5"], "RoPE"),
    (["--rotary-interleaved"], "RoPE"),
    (["--position-embedding-type", "none"], "RoPE"),
    (["--position-embedding-type", "yarn"], "RoPE"),
    (["--embedding-init-method-std", "0.1"], "initial weights"),
    (["--experimental-attention-variant", "dsa"], "attention"),
    (["--moe-aux-loss-coeff", "0.01"], "--seq-aux-loss-coeff"),
    (["--moe-router-pre-softmax"], "sigmoid"),
    (["--freeze-all-layers"], "fine-tuning"),
    (["--fim-data"], "fill-in-the-middle"),
]


def refusals(rank: int, world_size: int, lines: Sequence[Sequence[str]]) -> list[str]:
    from megatron_trinity.arguments.parse import parse_arguments

    told = []
    for words in lines:
        with pytest.raises(UsageError) as refusal:
            parse_arguments(["--preset", "tiny", "--train-iters", "10", *words])
        told.append(str(refusal.value))
    return told


def test_what_is_pasted_from_other_scripts_is_refused(ranks: RankPools) -> None:
    [told] = ranks.run(refusals, [words for words, _ in PASTED], world_size=1)
    for (words, reason), message in zip(PASTED, told, strict=True):
        assert words[0] in message
        assert reason in message
        assert "\n" not in message


def test_a_preset_is_no_way_around(ranks: RankPools, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    tiny = (ROOT / "megatron_trinity/presets/tiny.yaml").read_text()
    preset.write_text(tiny.replace("megatron:\n", "megatron:\n  rotary-percent: 0.5\n", 1))
    [[told]] = ranks.run(refusals, [["--preset", str(preset)]], world_size=1)
    assert told.startswith("--rotary-percent is refused: ")


class Runs:
    """Short runs of the trainer; those without the flag that is tried are shared."""

    def __init__(self, ranks: RankPools, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._without: dict[tuple[str, ...], Steps] = {}
        for name, seed in (("data", 3), ("other", 9)):
            write_dataset(folder / name, seed=seed)

    def without(self, example: Example) -> Steps:
        if example.base not in self._without:
            self._without[example.base] = self._run(example.base, 1)
        return self._without[example.base]

    def with_flag(self, example: Example) -> Steps:
        return self._run((*example.base, *example.needed, *example.words), example.ranks)

    def _run(self, words: Sequence[str], world_size: int) -> Steps:
        number = len(list(self._folder.glob("run-*")))
        tmp = self._folder / f"run-{number}"
        tmp.mkdir()
        places = {"{tmp}": str(tmp), "{data}": str(self._folder / "other")}
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]
        flags = training_flags(
            self._folder / "data",
            *("--train-iters", str(STEPS), "--lr", "5e-3", "--lr-warmup-iters", "0"),
            # Else the first steps would be the signs of rounding errors where gradients vanish.
            *("--adam-eps", "1e-4"),
            *words,
        )
        codes = self._ranks.run(run_recorded, flags, tmp / "steps", world_size=world_size)
        assert codes == [0] * world_size
        return {
            number: [float.fromhex(value) for value in values.replace(",", " ").split()]
            for number, values in recorded(tmp / "steps")
        }


@pytest.fixture(scope="module")
def runs(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("flags"))


def difference(one: Steps, other: Steps) -> float:
    """The largest of two runs over the steps that both took, relative."""
    return max(
        (
            abs(a - b) / abs(b)
            for step in one.keys() & other.keys()
            for a, b in zip(one[step], other[step], strict=True)
        ),
        default=0.0,
    )


def tried(examples: Sequence[Example]) -> list[Example]:
    return [e for e in examples if e.shown_by is None and e.untried is None]


QUICK = 4


@pytest.mark.parametrize("example", first(QUICK, tried(works())), ids=lambda e: e.flag)
def test_it_works(runs: Runs, example: Example) -> None:
    assert difference(runs.with_flag(example), runs.without(example)) > SAME


@pytest.mark.parametrize("example", first(QUICK, tried(same_answer())), ids=lambda e: e.flag)
def test_it_gives_the_same_answer(runs: Runs, example: Example) -> None:
    with_flag = runs.with_flag(example)
    assert with_flag or example.flag == "--skip-train"
    assert difference(with_flag, runs.without(example)) <= (
        HALF if "--fp16" in example.base else SAME
    )


def test_a_value_that_is_standard_may_be_given(parser: argparse.ArgumentParser) -> None:
    args: Namespace = parser.parse_args(["--rotary-percent", "1.0", "--normalization", "RMSNorm"])
    assert off_standard(args, standard_values(parser)) == set()
