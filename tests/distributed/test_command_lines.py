"""Command lines that cannot work, each with its exit code and its one line.

What the trainer would otherwise end with a traceback, or would ignore.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_trinity.errors import TrinityError
from tests.distributed.pool import RankPools
from tests.trainer import run_trainer, training_flags, write_dataset

PROFILE = "--profile --use-pytorch-profiler --tensorboard-dir {tmp}/log"
WANDB = "--wandb-project a --wandb-exp-name b --tensorboard-dir {tmp}/log"
TINY = "--preset tiny --train-iters 4"

WITH_DATA = {
    # Services and tools that are not there.
    "--wandb-project a": "--wandb-project needs a name for the run; give --wandb-exp-name",
    "--wandb-project a --wandb-exp-name b": "--wandb-project keeps files in a folder; give "
    "--wandb-save-dir or --save",
    "--wandb-project a --wandb-exp-name b --wandb-save-dir {tmp}": "--wandb-project: Megatron "
    "reports there what it also writes for TensorBoard, and no loss without that; give "
    "--tensorboard-dir as well",
    f"{WANDB} --wandb-save-dir {{tmp}}": "--wandb-project needs the "
    'package wandb, which is not installed; use pip install ".[wandb]", or leave it out',
    "--profile": "--profile starts the profiler of CUDA, which this machine does not have; use "
    "--use-pytorch-profiler as well",
    "--use-pytorch-profiler": "--use-pytorch-profiler says with what to profile, and nothing is "
    "profiled; use --profile as well, or leave it out",
    "--profile --use-pytorch-profiler": "--profile with --use-pytorch-profiler writes into the "
    "folder that --tensorboard-dir is in; give that",
    PROFILE: "--profile-step-start 10 has to come before --profile-step-end 12, and both within "
    "the 4 iterations of the run; change one of them",
    f"{PROFILE} --profile-step-start 2 --profile-step-end 3 --profile-ranks 0 4": "--profile-ranks "
    "[0, 4] are not all of this run; use 0 to one below 1",
    "--attention-backend local": "--attention-backend local needs layers of Megatron's own; use "
    "auto or unfused",
    "--attention-backend flash": "needs CUDA, which this machine does not have: "
    "--attention-backend (use auto or unfused)",
    "--attention-backend fast": "argument --attention-backend: 'fast' is none of flash, fused, "
    "unfused, local, auto; --help lists every flag",
    # Sizes.
    "--kv-channels 7": "--kv-channels 7: RoPE turns pairs of channels; use an even number",
    "--kv-channels 0": "--kv-channels 0: use 1 or more, or leave it out",
    "--kv-channels -8": "--kv-channels -8: use 1 or more, or leave it out",
    "--num-attention-heads 3": "--num-attention-heads 3 do not divide into --num-query-groups 2; "
    "use a divisor",
    "--num-attention-heads 0": "--num-attention-heads 0: use 1 or more",
    "--num-query-groups 3": "--num-attention-heads 4 do not divide into --num-query-groups 3; "
    "use a divisor",
    "--num-query-groups -2": "--num-query-groups -2: use 1 or more",
    "--hidden-size 0": "--hidden-size 0: use 1 or more",
    "--hidden-size -64": "--hidden-size -64: use 1 or more",
    "--ffn-hidden-size 33": "--ffn-hidden-size 33: Megatron's warm-up halves the part of each of "
    "--tensor-model-parallel-size 1 ranks; use a multiple of twice that",
    "--moe-ffn-hidden-size 0": "--moe-ffn-hidden-size 0: use 1 or more",
    "--seq-length 0": "--seq-length 0: use 1 or more",
    "--vocab-size 0": "--vocab-size 0: use 1 or more, or leave it out",
    "--make-vocab-size-divisible-by 0": "--make-vocab-size-divisible-by 0: use 1 or more",
    "--init-method-std 0": "--init-method-std 0.0: use more than 0",
    "--norm-epsilon -1": "--norm-epsilon -1.0: use 0 or more",
    "--adam-beta1 1": "--adam-beta1 1.0, --adam-beta2 0.999: use 0 or more, and less than 1",
    "--seed 0": "--seed 0: use 1 or more",
    # Intervals and lengths of time.
    "--save {tmp}/run": "--save does not say when; give --save-interval as well, the iterations "
    "from one checkpoint to the next",
    "--save-interval 2": "--save-interval, --save-params-interval, --save-wgrads-interval and "
    "--save-tokens-per-expert-interval save nothing where it is not said; give --save",
    "--save {tmp}/run --save-interval 0": "--save-interval 0: use 1 or more, or leave it out",
    "--exit-duration-in-mins 0": "--exit-duration-in-mins 0: use 1 or more, or leave it out",
    "--exit-interval 0": "--exit-interval 0: use 1 or more, or leave it out",
    "--exit-interval -2": "--exit-interval -2: use 1 or more, or leave it out",
    "--eval-interval 0": "--eval-interval has to be 1 or more and --eval-iters 0 or more; use "
    "--eval-iters 0 for a run that does not evaluate",
    "--log-interval 0": "--log-interval 0: use 1 or more",
    "--log-memory-interval 3 --log-interval 2": "--log-memory-interval 3 is no multiple of "
    "--log-interval 2; use a multiple",
    "--exit-signal 5": "argument --exit-signal: '5' is none of SIGHUP, ",
    # Recompute of no layers did not end.
    "--recompute-granularity full --recompute-method uniform": "--recompute-granularity full needs "
    "to know of how many layers; give --recompute-num-layers",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 0": ""
    "--recompute-num-layers 0: use 1 or more, or leave it out",
    # What cannot be another way.
    "--init-method-xavier-uniform": "--init-method-xavier-uniform is refused: initial weights are "
    "the report's, truncated normal by --init-method-std, and the embedding is scaled by "
    "--mup-enabled alone; leave it out",
    "--no-untie-embeddings-and-output-weights": "--no-untie-embeddings-and-output-weights: "
    "--untie-embeddings-and-output-weights cannot be turned off: every Trinity model has it; leave "
    "it out; --help lists every flag",
    "--no-calculate-per-token-loss": "--no-calculate-per-token-loss: --calculate-per-token-loss "
    "cannot be turned off: it is on already; leave it out; --help lists every flag",
}
"""Behind the flags of a small run that works; each ends with exit code 2."""

SIZES = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-experts 4 "
    "--moe-ffn-hidden-size 32 --sliding-window 8 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1"
)
WHOLE = "no whole model is given; use --preset, or give also "

ALONE = {
    "--train-iters 4": WHOLE + ", ".join(word for word in SIZES.split() if word.startswith("--")),
    f"--train-iters 4 {SIZES}".replace(" --moe-ffn-hidden-size 32", ""): WHOLE
    + "--moe-ffn-hidden-size",
    f"--train-iters 4 {SIZES}".replace(" --seq-length 16", ""): WHOLE + "--seq-length",
    f"--train-iters 4 {SIZES} --tokenizer-type NullTokenizer --lr 1": "--tokenizer-type "
    "NullTokenizer has no vocabulary of its own; give --vocab-size",
    f"{TINY} --hidden-size 0": "--hidden-size 0: use 1 or more",
    f"{TINY} --hidden-size -64": "--hidden-size -64: use 1 or more",
    f"--train-iters 4 {SIZES} --num-attention-heads 5 --lr 1": "--hidden-size 64 does not "
    "divide into --num-attention-heads 5 of an even size; give the size of a head, --kv-channels",
    f"--train-iters 4 {SIZES} --hidden-size 68 --lr 1": "--hidden-size 68 does not divide into "
    "--num-attention-heads 4 of an even size; give the size of a head, --kv-channels",
}
"""Without the small run; each ends with exit code 2."""


def outcomes(rank: int, world_size: int, lines: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Exit code and line of the trainer with each of the command lines."""
    results = []
    for flags in lines:
        try:
            results.append((run_trainer(rank, world_size, flags), ""))
        except TrinityError as error:
            results.append((error.exit_code, str(error)))
    return results


def test_each_ends_in_its_line(ranks: RankPools, tmp_path: Path) -> None:
    data, places = tmp_path / "data", {"{tmp}": str(tmp_path)}
    table = {**WITH_DATA, **ALONE}
    lines = []
    for words in table:
        given = words.replace("{tmp}", places["{tmp}"]).split()
        small = training_flags(data, "--train-iters", "4", *given)
        lines.append(small if words in WITH_DATA else given)
    [results] = ranks.run(outcomes, lines, world_size=1)
    for (words, line), (code, told) in zip(table.items(), results, strict=True):
        assert code == 2, words
        assert told.startswith(line) if line.endswith(" ") else told == line, words
        assert "\n" not in told
    assert list(tmp_path.iterdir()) == []  # nothing was begun


BACKENDS = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def test_what_looks_odd_and_works(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    words = "--train-iters 3 --hidden-size 63 --moe-ffn-hidden-size 33 --kv-channels 2"
    flags = training_flags(tmp_path / "data", *words.split(), "--attention-backend", "unfused")
    assert ranks.run(run_alone, flags, world_size=1) == [0]


def run_alone(rank: int, world_size: int, flags: Sequence[str]) -> int:
    """Train with another backend than the runs before and behind it in this process.

    Megatron keeps the backend in the environment, and refuses another.
    """
    kept = {name: os.environ.pop(name) for name in BACKENDS if name in os.environ}
    try:
        return run_trainer(rank, world_size, flags)
    finally:
        for name in BACKENDS:
            os.environ.pop(name, None)
        os.environ.update(kept)


class NotLoggedIn(Exception):
    """As W&B raises it."""


NotLoggedIn.__module__ = "wandb.errors.errors"


def with_a_wandb(
    rank: int, world_size: int, flags: Sequence[str], logged_in: bool
) -> tuple[list[str], str, list[tuple[str, str]]]:
    """Train with a module in the place of wandb: what it was told, the error, which run it is."""
    calls: list[str] = []
    runs: list[tuple[str, str]] = []

    def init(**given: Any) -> None:
        calls.append(f"init {given['project']} {given['name']}")
        runs.append((os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]))
        if not logged_in:
            raise NotLoggedIn("No API key configured.")

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.init = init  # type: ignore[attr-defined]
    module.log = lambda values, step: calls.extend(f"{step} {name}" for name in values)  # type: ignore[attr-defined]
    module.finish = lambda: calls.append("finish")  # type: ignore[attr-defined]
    module.config = {}  # type: ignore[attr-defined]
    module.Artifact = module.run = mock.MagicMock()  # type: ignore[attr-defined]
    sys.modules["wandb"] = module
    try:
        assert run_trainer(rank, world_size, flags) == 0
    except TrinityError as error:
        return calls, str(error), runs
    finally:
        del sys.modules["wandb"]
    return calls, "", runs


def test_a_run_that_reports_to_wandb(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    words = f"--train-iters 3 {WANDB} --wandb-save-dir {{tmp}}".replace("{tmp}", str(tmp_path))
    flags = training_flags(tmp_path / "data", *words.split())
    [(calls, error, _)] = ranks.run(with_a_wandb, flags, False, world_size=1)
    assert calls == ["init a b"]
    assert error == (
        "W&B does not start: No API key configured; with WANDB_MODE=offline it writes files "
        "alone, or leave out --wandb-project"
    )
    [(calls, error, _)] = ranks.run(with_a_wandb, flags, True, world_size=1)
    assert error == ""
    assert calls[0] == "init a b"
    assert calls[-1] == "finish"
    assert {"1 lm loss", "2 lm loss", "3 lm loss"} <= set(calls)


def test_a_run_that_goes_on_continues_its_wandb_run(ranks: RankPools, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    found = {}
    for name in ("new", "goes on", "another name", "elsewhere"):
        run = tmp_path / ("other" if name == "elsewhere" else "run")
        words = WANDB.replace("{tmp}", str(run)).split()
        last = {"new": "1", "elsewhere": "1"}.get(name, "2" if name == "goes on" else "3")
        flags = [*words, "--save", str(run), "--load", str(run), "--save-interval", "9"]
        flags += ["--optimizer", "adam", "--train-iters", "3", "--exit-interval", last]
        if name == "another name":
            flags += ["--wandb-exp-name", "c"]
        flags = training_flags(tmp_path / "data", *flags)
        [(calls, error, runs)] = ranks.run(with_a_wandb, flags, True, world_size=1)
        assert error == ""
        [found[name]] = runs
        assert any(call.endswith(" lm loss") for call in calls)
    assert found["new"] == found["goes on"]
    assert len({run_id for run_id, _ in found.values()}) == 3
    assert {resume for _, resume in found.values()} == {"allow"}


def test_a_preset_that_ties_the_embeddings(ranks: RankPools, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("megatron:\n  untie-embeddings-and-output-weights: false\n")
    lines = [["--preset", str(preset), "--train-iters", "4"]]
    [[(code, told)]] = ranks.run(outcomes, lines, world_size=1)
    assert code == 2
    assert told.endswith("cannot be turned off: every Trinity model has it; leave it out")


@pytest.mark.parametrize("enumeration", ["attention-backend", "exit-signal"])
def test_a_preset_with_a_name_of_no_enumeration(
    ranks: RankPools, tmp_path: Path, enumeration: str
) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"megatron:\n  {enumeration}: fast\n")
    lines = [["--preset", str(preset), "--train-iters", "4"]]
    [[(code, told)]] = ranks.run(outcomes, lines, world_size=1)
    assert code == 2
    assert f"megatron: {enumeration} cannot be 'fast': 'fast' is none of " in told
