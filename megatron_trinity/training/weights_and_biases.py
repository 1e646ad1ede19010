"""A run's W&B run: started with one-line errors, and continued by the next process."""

from __future__ import annotations

import json
import os
import secrets
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from megatron_trinity.checkpoint.whole.candidates import is_empty
from megatron_trinity.errors import TrinityError
from megatron_trinity.reporting.events import run_folder
from megatron_trinity.training.load_paths import goes_on_in_save
from megatron_trinity.upstream.checkpoint_tracker import replacing

NAME = "wandb.json"

_SAME = ("wandb_project", "wandb_entity", "wandb_exp_name")
"""Arguments that name one W&B run."""


@contextmanager
def telling_wandb(args: Namespace) -> Iterator[None]:
    """Have a W&B run that starts inside the block be the run's own.

    Raises:
        TrinityError: in place of an error of W&B's, which may be absent.
    """
    reports = bool(args.wandb_project) and args.rank == args.world_size - 1
    with mock.patch.dict(os.environ, _environment(args) if reports else {}):
        try:
            yield
        except Exception as error:
            if not type(error).__module__.startswith("wandb"):
                raise
            said = " ".join(str(error).split()).rstrip(".")
            raise TrinityError(
                f"W&B does not start: {said}; with WANDB_MODE=offline it writes files alone, or "
                "leave out --wandb-project"
            ) from error


def _environment(args: Namespace) -> dict[str, str]:
    """What tells W&B which run it is; nothing where the user has."""
    folder = run_folder(args)
    if "WANDB_RUN_ID" in os.environ or folder is None:
        return {}
    named = {name: getattr(args, name) for name in _SAME}
    run_id = _known(folder / NAME, named) if _goes_on(args) else None
    if run_id is None:
        run_id = secrets.token_hex(4)
        _write(folder / NAME, {**named, "id": run_id})
    return {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"}


def _goes_on(args: Namespace) -> bool:
    return goes_on_in_save(args) and not is_empty(Path(args.save))


def _known(path: Path, named: dict[str, str]) -> str | None:
    try:
        found = json.loads(path.read_text())
        return str(found["id"]) if named.items() <= found.items() else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _write(path: Path, content: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            json.dump(content, file)
    except OSError as error:
        print(
            f"WARNING: {path} cannot be written ({error.strerror}): a resume starts another W&B "
            "run",
            flush=True,
        )
