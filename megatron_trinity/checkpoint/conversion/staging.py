"""A directory for work that is not done yet, which goes on there after an interruption."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_trinity.errors import TrinityError

PLAN, LOCK = "plan.json", "lock"


@contextlib.contextmanager
def resumable_staging(target: Path, plan: object, needed: int) -> Iterator[Path]:
    """A hidden directory beside `target` for work that `plan` describes.

    It is gone when the work is done and after an error in what is converted, kept if the work is
    interrupted or the disk fails, and emptied first if it is of another plan.

    Args:
        plan: all that the result depends on, fit for JSON.
        needed: bytes that the work writes.

    Raises:
        TrinityError: it cannot be made, the disk is too small, another process is at work there,
            or `target` is a symbolic link.
    """
    if target.is_symlink():
        raise TrinityError(
            f"{target} is a symbolic link, and links are not written through: name the directory "
            f"that it leads to, {target.resolve()}, or remove the link"
        )
    staging = target.parent / f".{target.name}.part"
    fingerprint = {"plan": hashlib.sha256(json.dumps(plan).encode()).hexdigest()}
    parent_is_new = not target.parent.exists()
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = open(staging / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise TrinityError(f"cannot write into {target.parent}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrinityError(f"another process is writing {target}") from error
        try:
            _keep_or_empty(staging, fingerprint)
            _refuse_small_disk(staging, needed)
            yield staging
            shutil.rmtree(staging)
        except TrinityError:
            shutil.rmtree(staging, ignore_errors=True)
            if parent_is_new:
                target.parent.rmdir()
            raise
        except OSError as error:
            raise TrinityError(
                f"cannot write {target}: {error.strerror or error}; what is finished is kept in "
                f"{staging}, run the same again to go on"
            ) from error


def _keep_or_empty(staging: Path, fingerprint: dict[str, str]) -> None:
    plan = staging / PLAN
    if not plan.is_file() or json.loads(plan.read_text()) != fingerprint:
        for path in staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        plan.write_text(json.dumps(fingerprint))


def _refuse_small_disk(staging: Path, needed: int) -> None:
    # Of a file that has all its length from the beginning, what is on the disk counts.
    written = sum(512 * path.stat().st_blocks for path in staging.rglob("*") if path.is_file())
    free = shutil.disk_usage(staging).free
    if needed - written > free:
        raise TrinityError(
            f"{needed / 1e9:,.1f} GB are to be written and {staging.parent} has "
            f"{free / 1e9:,.1f} GB free"
        )
