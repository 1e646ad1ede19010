"""`--load` that finds nothing: a new run in its own directory, and one clear line elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.broken_runs import flags_of, train
from tests.distributed.pool import RankPools
from tests.trainer import write_dataset


@pytest.fixture(scope="module")
def folder(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a `run` of two steps that began in no directory, `nothing`, and a directory of HF."""
    folder = tmp_path_factory.mktemp("load")
    write_dataset(folder / "data")
    run = f"{folder}/run"
    relative = str(folder / "nothing" / ".." / "run")
    first = [*flags_of(folder, Path(run), "--exit-interval", "2"), "--save", relative]
    (folder / "nothing").mkdir()
    assert ranks.run(train, first, world_size=1)[0][:2] == (0, "")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").touch()
    (folder / "hf" / "model.safetensors.index.json").touch()
    return folder


ONE = "{folder}/run/iter_0000002"
CASES: dict[str, tuple[list[str], str]] = {
    "absent": (["--load", "{folder}/none"], "--load {folder}/none is not there"),
    "empty": (["--load", "{folder}/nothing"], "--load {folder}/nothing holds no checkpoint"),
    "to fine-tune": (["--load", "{folder}/none", "--finetune"], "--load {folder}/none is not"),
    "by name": (["--load", "{folder}/none", "--ckpt-step", "2"], "--load {folder}/none is not"),
    "pretrained": (
        ["--pretrained-checkpoint", "{folder}/none"],
        "--pretrained-checkpoint {folder}/none is not there",
    ),
    "pretrained, and another to load": (
        ["--load", "{folder}/none", "--pretrained-checkpoint", "{folder}/run"],
        "--load {folder}/none is not there",
    ),
    "has to be there": (["--exit-on-missing-checkpoint"], "--load {folder}/new holds no check"),
    "an iteration": (["--load", ONE], "give --load {folder}/run --ckpt-step 2"),
    "an iteration to fine-tune": (["--load", ONE, "--finetune"], "--load {folder}/run --ckpt-st"),
    "an iteration of its own": (["--load", ONE, "--save", ONE], "--load {folder}/run --ckpt-st"),
    "a pretrained iteration": (
        ["--pretrained-checkpoint", ONE],
        "give --pretrained-checkpoint {folder}/run --ckpt-step 2",
    ),
    "Hugging Face": (["--load", "{folder}/hf"], "tools/import_hf.py --hf {folder}/hf"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_finds_nothing_is_refused(ranks: RankPools, folder: Path, case: str) -> None:
    words, says = CASES[case]
    flags = flags_of(folder, folder / "new", *(word.format(folder=folder) for word in words))
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert code == 2
    assert says.format(folder=folder) in error
    assert "\n" not in error
    assert not (folder / "new").exists()


def test_without_a_directory_to_save_in(ranks: RankPools, folder: Path) -> None:
    flags = flags_of(folder, folder / "none")
    for flag in ("--save", "--save-interval"):
        place = flags.index(flag)
        del flags[place : place + 2]
    code, error, _ = ranks.run(train, flags, world_size=1)[0]
    assert (code, error.split(";")[0]) == (2, f"--load {folder / 'none'} is not there")
