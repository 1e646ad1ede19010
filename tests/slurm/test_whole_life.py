"""The life of a job of the real sbatch file, on stand-ins for Slurm that start real processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.crosses import first
from tests.paths import ROOT
from tests.steps import recorded
from tests.trainer import training_flags, write_dataset

STAND_INS = ROOT / "tests/slurm/stand_ins"
HOOKS = ROOT / "tests/slurm/hooks"
LIMIT = 400.0  # seconds
LAST = 16
PRESETS = ("nano", "mini", "large")


def environment(folder: Path, **more: object) -> dict[str, str]:
    own = {
        "PATH": f"{STAND_INS}:{ROOT}/.venv/bin:{os.environ['PATH']}",
        "PYTHONPATH": f"{HOOKS}:{ROOT}",
        "FAKE_SLURM": str(folder),
        "STEPS": str(folder / "steps"),
        "RUN": str(folder / "run"),
        "OMP_NUM_THREADS": "1",
        "GPUS_PER_NODE": "1",
        "NODES": "2",
    }
    given = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return given | own | {name: str(value) for name, value in more.items()}


def sbatch_file(preset: str) -> Path:
    return ROOT / f"examples/trinity_{preset}/04_pretrain_slurm.sbatch"


def small(folder: Path) -> Path:
    """A step that two ranks of this machine can train, in the place of the file's."""
    write_dataset(folder / "data")
    flags = training_flags(
        folder / "data",
        *("--train-iters", str(LAST), "--lr-decay-iters", str(LAST), "--lr-wsd-decay-iters", "4"),
        *("--save-interval", "4"),
    )
    step = folder / "step.sh"
    of_run = '--save "$RUN/checkpoints" --load "$RUN/checkpoints"'
    words = f"pretrain_trinity.py {shlex.join(flags)} {of_run}"
    step.write_text(f'exec bash scripts/launch.sh {words} "$@"\n')
    return step


@pytest.mark.slow
def test_a_whole_life_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Two nodes of three train: one fails its check. The time limit comes, then a rank dies."""
    whole, folder = tmp_path / "whole", tmp_path / "life"
    whole.mkdir()
    folder.mkdir()
    floors = tmp_path / "floors.yaml"
    floors.write_text(
        "disk_free_gb: 0\ndevices: {H100: {number: 2, nvlinks: 18, product_tflops: 0}}\n"
    )
    step = small(tmp_path)

    def start(where: Path, seconds: float) -> subprocess.Popen[bytes]:
        given = environment(
            where,
            STEP=step,
            STEP_SECONDS=seconds,
            BAD_NODE="127.0.0.2",
            CHECK=f"--quick --floors {floors}",
        )
        words = [str(STAND_INS / "sbatch"), "--nodes=3", str(sbatch_file("nano"))]
        return subprocess.Popen(words, cwd=ROOT, env=given, start_new_session=True)

    jobs = [start(whole, 0.0)]
    try:
        assert jobs[0].wait(LIMIT) == 0, (whole / "output").read_text()
        reference = dict(recorded(whole / "steps"))
        assert list(reference) == list(range(1, LAST + 1))

        jobs.append(start(folder, 0.3))
        steps = folder / "steps"
        wait_for(lambda: len(recorded(steps)) >= 2, jobs[1], folder)
        (folder / "limit-0").touch()
        wait_for(lambda: "slurm: requeued" in output_of(folder), jobs[1], folder)
        before_limit = len(recorded(steps))
        assert before_limit < LAST - 4
        wait_for(lambda: len(recorded(steps)) >= before_limit + 2, jobs[1], folder)
        os.kill(a_rank(str(jobs[1].pid)), signal.SIGKILL)
        assert jobs[1].wait(LIMIT) == 0, output_of(folder)
    finally:
        for job in jobs:
            if job.poll() is None:
                for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                    process.kill()
    text = output_of(folder)
    assert text.count("slurm: left out: 127.0.0.2") == 3
    assert text.count("slurm: requeued") == 2
    assert f"requeued, to go on from iteration {before_limit}" in text  # saved at the limit
    done = recorded(steps)
    assert dict(done) == reference
    assert all(reference[number] == values for number, values in done)
    assert [number for number, _ in done[:before_limit]] == list(range(1, before_limit + 1))
    assert done[before_limit][0] == before_limit + 1  # nothing done twice over the limit

    launches = folder / "run/checkpoints/launches"
    outcomes = [(launches / str(n) / "outcome.txt").read_text().strip() for n in range(3)]
    assert outcomes[0] == "again: the time limit"
    assert outcomes[1].startswith("again: ranks ended with -9")
    assert outcomes[2] == "done"
    kept = {path.name for path in (launches / "2").iterdir()}
    names = ("command.sh", "environment.txt", "git.txt", "packages.txt", "node-0.log", "node-1.log")
    assert kept >= set(names)
    assert "torch==" in (launches / "2/packages.txt").read_text()
    assert "SLURM_JOB_ID=" in (launches / "2/environment.txt").read_text()
    assert " --nodelist 127.0.0.1\\,127.0.0.3 " in (launches / "2/command.sh").read_text()


def wait_for(come: Callable[[], bool], job: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + LIMIT
    while not come():
        assert job.poll() is None, output_of(folder)
        assert time.monotonic() < until, output_of(folder)
        time.sleep(0.05)


def output_of(folder: Path) -> str:
    return (folder / "output").read_text()


def a_rank(job: str) -> int:
    """The process of rank 1 of a job."""
    for process in psutil.process_iter(["pid"]):
        try:
            known, words = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        of_job = known.get("SLURM_JOB_ID") == job and known.get("RANK") == "1"
        if of_job and any(word.endswith("pretrain_trinity.py") for word in words):
            return process.pid
    raise AssertionError(f"job {job} has no rank 1")


def dry_run(file: Path, folder: Path, *words: str, **more: object) -> list[str]:
    answer = subprocess.run(
        ["bash", str(file), *words],
        cwd=ROOT,
        env=environment(folder, DRY_RUN=1, **more),
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(answer.stdout)


@pytest.mark.parametrize("preset", first(1, PRESETS))
def test_the_command_of_a_job(tmp_path: Path, preset: str) -> None:
    words = dry_run(sbatch_file(preset), tmp_path, "--lr", "1e-4", NODES=4, GPUS_PER_NODE=8)
    assert words[0] == "srun"
    assert words[words.index("--nodelist") + 1] == "node1,node2,node3,node4"
    assert words[words.index("--nnodes") + 1] == "4"
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert words[words.index("--rdzv-endpoint") + 1] == "node1:29400"
    assert words[words.index("--preset") + 1] == preset
    assert words[-2:] == ["--lr", "1e-4"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_array_is_of_seeds(tmp_path: Path) -> None:
    words = dry_run(sbatch_file("nano"), tmp_path, SLURM_ARRAY_TASK_ID=7)
    assert words[words.index("--save") + 1] == f"{tmp_path}/run/seed-7/checkpoints"
    assert words[-2:] == ["--seed", "7"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("nvcr.io#x:1", ["--container-image", "nvcr.io#x:1", "--container-mounts"]),
        ("a.sif", ["apptainer", "exec", "--nv", "--bind"]),
    ],
)
def test_a_container_stands_ahead_of_the_command(
    tmp_path: Path, container: str, expected: list[str]
) -> None:
    words = dry_run(sbatch_file("nano"), tmp_path, CONTAINER=container, MOUNTS="/a,/b")
    place = words.index(expected[0])
    assert words[place : place + len(expected)] == expected
    assert words[place + len(expected)] == f"{ROOT}:{ROOT},/a:/a,/b:/b"
    assert words.index("torchrun") > place


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("01_data.sh", ["python", "tools/prepare_data.py"]),
        ("02_import.sh", ["python", "tools/import_hf.py"]),
        ("05_export.sh", ["python", "tools/export_hf.py"]),
    ],
)
def test_the_steps_around_it(tmp_path: Path, preset: str, step: str, words: list[str]) -> None:
    told = dry_run(ROOT / f"examples/trinity_{preset}" / step, tmp_path, "--overwrite")
    assert told[:2] == words
    assert told[-1] == "--overwrite"
