"""Models by their names on the Hugging Face Hub: from the local cache, else from the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from megatron_trinity.checkpoint.hf.files import GENERATION_CONFIG, TOKENIZER_FILES
from megatron_trinity.checkpoint.hf.source import INDEX, files_of
from megatron_trinity.errors import TrinityError, UsageError, root_cause

PATTERNS = ("config.json", INDEX, "*.safetensors", GENERATION_CONFIG, *TOKENIZER_FILES)
"""What an import reads; a repository may have the same weights as pickles too."""


@dataclass(frozen=True)
class Found:
    """Where a model is.

    Attributes:
        path: directory.
        revision: commit on the Hub; None for a directory that was named itself.
    """

    path: Path
    revision: str | None = None


def find_model(name: str, revision: str | None = None, download: bool = True) -> Found:
    """The directory `name`, or the snapshot of the Hub's model of that name.

    The network is not touched for a directory, nor for a model that the cache has whole.

    Args:
        revision: branch, tag or commit of a model of the Hub; by default its main branch.
        download: take from the Hub what the cache lacks.

    Raises:
        UsageError: a revision of a directory.
        TrinityError: there is no such directory, and no such model either.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise UsageError(f"{name} is a directory, which has no --revision")
        return Found(Path(name))
    if not _may_be_on_the_hub(name):
        raise TrinityError(f"{name} is no directory, and no OWNER/NAME of the Hugging Face Hub")
    cached = _cached(name, revision)
    if cached is not None:
        return cached
    at = f"{name} at {revision}" if revision else name
    if not download:
        raise TrinityError(f"{name} is no directory, and the Hub's cache has not all of {at}")
    print(
        f"{name} is no directory, and the Hub's cache has not all of {at}: downloading", flush=True
    )
    try:
        return _found(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # of huggingface_hub and of its HTTP client: of many kinds
        raise TrinityError(
            f"{at} cannot be taken from the Hugging Face Hub: {_why(error)}; check the name "
            "and the network, or give a directory"
        ) from error


def _why(error: Exception) -> str:
    if isinstance(error, RepositoryNotFoundError):
        return "it has no such model, or none that HF_TOKEN may read"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    return root_cause(error)


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _cached(name: str, revision: str | None) -> Found | None:
    """What the cache has of a model, if that is whole."""
    try:
        path = snapshot_download(
            name, revision=revision, allow_patterns=list(PATTERNS), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    # The cache of an older huggingface_hub does not know which files there are to be.
    found = _found(path)
    if not (found.path / "config.json").is_file():
        return None
    whole = all((found.path / file).is_file() for file in files_of(found.path))
    return found if whole else None


def _found(snapshot: str) -> Found:
    path = Path(snapshot)
    return Found(path, path.name)
