"""What a run tells as it goes: events into its file, lines on the console."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from torch import Tensor

from megatron_trinity.arguments.parse import written_arguments
from megatron_trinity.arguments.written import NAME as ARGUMENTS
from megatron_trinity.data.plan import Given
from megatron_trinity.errors import SpikeError, Stopped, TrinityError
from megatron_trinity.exits import DONE, FAILED
from megatron_trinity.moe.metrics import LoadMetrics
from megatron_trinity.planning.kernels import on_gpu
from megatron_trinity.planning.memory import stage_memory
from megatron_trinity.planning.parameters import active_parameters, total_parameters
from megatron_trinity.planning.sizes import ModelSizes
from megatron_trinity.planning.stages import stage_chunks
from megatron_trinity.reporting.console import StepConsole, StepValues, digits
from megatron_trinity.reporting.events import logging_events, logs_events, note, run_folder
from megatron_trinity.reporting.schema import SCHEMA
from megatron_trinity.training.data_given import WRITTEN
from megatron_trinity.upstream.checkpoint_tracker import replacing

PICTURES = 100
"""How often in a run the load of every expert is written."""

PACKAGES = ("torch", "megatron-core", "transformer-engine", "emerging-optimizers", "numpy")


class Journal:
    """Takes what is known behind each step, on every rank; the last one tells it.

    Args:
        args: of the run.
        argv: the words of its command line; None for the process's own.
    """

    def __init__(self, args: Namespace, argv: Sequence[str] | None = None) -> None:
        self._args = args
        self._argv = sys.argv[1:] if argv is None else list(argv)
        self._tells = args.rank == args.world_size - 1
        self.iteration: int | None = None
        self._evaluated: tuple[int, str, bool] | None = None
        self._console = None
        if self._tells and not args.verbose_log:
            self._console = StepConsole(args.train_iters or 1, args.log_interval)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the run's files in here, and say how it ends."""
        with logging_events(run_folder(self._args), self._tells):
            try:
                yield
            except BaseException as error:
                self._ends(*_end_of(error))
                raise
            else:
                self._ends(DONE, "")
            finally:
                if self._console is not None:
                    self._console.close()

    def begins(self, behind: int, layers: Sequence[int]) -> None:
        """Before the first step of the process."""
        if self._console is not None:
            self._console = StepConsole(self._args.train_iters, self._args.log_interval)
        if not logs_events():
            return
        sizes = ModelSizes.from_args(self._args)
        arguments = written_arguments(self._argv)
        self._write_arguments(arguments)
        note(
            {
                "kind": "start",
                "schema": SCHEMA,
                "iteration": behind,
                "launched": psutil.Process().create_time(),
                "world_size": self._args.world_size,
                "host": platform.node(),
                "command": self._argv,
                "arguments": arguments,
                "versions": _versions(),
                "git": _git(),
                "parameters": [total_parameters(sizes), active_parameters(sizes)],
                "planned_peak": planned_peak(self._args),
                "layers": list(layers),
                "train_iters": self._args.train_iters,
                "tokens_per_sample": self._args.seq_length,
            }
        )

    def step(
        self,
        step: StepValues,
        values: Mapping[str, float],
        applied: bool,
        layers: Sequence[int],
        metrics: LoadMetrics | None,
        loads: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Behind a step.

        Args:
            step: what a line says of it.
            values: all that is known of it, by the names in TensorBoard.
            applied: whether the weights have changed.
            layers: `[L]`, numbers of the MoE layers.
            metrics: of its balance; None of a step that is left out.
            loads: `[L, E]` counts and biases, likewise.
        """
        self.iteration = step.iteration
        if self._console is not None:
            self._console.step(step)
        if not logs_events():
            return
        event: dict[str, Any] = {
            "kind": "step",
            "iteration": step.iteration,
            "seconds": step.seconds,
            "samples": self._args.consumed_train_samples,
            "tokens": step.tokens,
            "applied": applied,
            "values": dict(values),
        }
        if metrics is not None:
            event["max violation"] = _short(metrics.max_violation.tolist())
        note(event)
        if loads is not None and layers and _is_pictured(step.iteration, self._args.train_iters):
            counts, bias = (tensor.tolist() for tensor in loads)
            rows = [_short(row) for row in bias]
            note({"kind": "loads", "iteration": step.iteration, "counts": counts, "bias": rows})

    def data(self, iteration: int, given: Sequence[Given]) -> None:
        """With each line of the log."""
        sources = {
            one.name: {"tokens": one.tokens, "documents": one.documents, "epochs": one.epochs}
            for one in given[:WRITTEN]
        }
        note({"kind": "data", "iteration": iteration, "sources": sources})

    def evaluated(
        self, name: str, of_test: bool, seconds: float, values: Mapping[str, float]
    ) -> None:
        """Behind the evaluation of one set."""
        iteration = self._args.curr_iteration + 1 if self.iteration is None else self.iteration
        note(
            {
                "kind": "evaluation",
                "iteration": iteration,
                "set": name,
                "of_test": of_test,
                "seconds": seconds,
                "values": dict(values),
            }
        )
        # Megatron evaluates at the end of training, and then once more.
        again, self._evaluated = (
            self._evaluated == (iteration, name, of_test),
            (
                iteration,
                name,
                of_test,
            ),
        )
        if self._console is not None and not again:
            told = ", ".join(f"{what} {value:.6g}" for what, value in values.items())
            of_set = ("test" if of_test else "validation") + (f" {name}" if name else "")
            self._console.mark("evaluated", f"{of_set} at {iteration}: {told}")

    def saved(self, iteration: int, seconds: float) -> None:
        """Behind a save."""
        background = bool(self._args.async_save)
        note({"kind": "save", "iteration": iteration, "seconds": seconds, "background": background})
        if self._console is not None:
            more = ", written in the background" if background else ""
            self._console.mark(
                "saved", f"saved {iteration} in {digits(seconds)} s to {self._args.save}{more}"
            )

    def _ends(self, code: int, line: str) -> None:
        if self.iteration is None and code == DONE:
            return  # it was to evaluate alone, or there was nothing left to train
        note({"kind": "end", "iteration": self.iteration, "code": code, "line": line})
        if self._console is not None and code == DONE:
            self._console.mark("done", f"trained to {self.iteration}")

    def _write_arguments(self, arguments: Mapping[str, Any]) -> None:
        folder = run_folder(self._args)
        assert folder is not None
        try:
            with replacing(folder / ARGUMENTS) as file:
                file.write(
                    f"# All arguments of a run: pretrain_trinity.py {shlex.join(self._argv)}\n"
                    f"# The same again: --preset {folder / ARGUMENTS}\n"
                )
                yaml.safe_dump(arguments, file, sort_keys=True)
        except OSError as error:
            print(f"WARNING: {folder / ARGUMENTS} cannot be written: {error.strerror}", flush=True)


def planned_peak(args: Namespace) -> int | None:
    """Bytes at once on a GPU of the last pipeline stage; None without one, where a process has
    more in its memory than tensors."""
    if not torch.cuda.is_available():
        return None
    stage, chunks = list(enumerate(stage_chunks(args)))[-1]
    return stage_memory(args, on_gpu(args), stage, chunks, exact=False).peak


def _is_pictured(iteration: int, last: int) -> bool:
    return iteration == 1 or iteration % max(1, last // PICTURES) == 0


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _end_of(error: BaseException) -> tuple[int, str]:
    """The exit code that a run ends with, and why."""
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else DONE), ""
    if isinstance(error, TrinityError | Stopped | SpikeError):
        return error.exit_code, str(error)
    return FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    """The commit that the code is of, where it is in a repository."""
    folder = Path(__file__).resolve().parent

    def asked(*words: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            env=environment,
        ).stdout.strip()

    try:
        commit = asked("rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(asked("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
