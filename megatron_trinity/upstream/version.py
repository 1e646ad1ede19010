"""The version of megatron-core that the adaptations were written for."""

from __future__ import annotations

import os
import warnings
from importlib import metadata

from megatron_trinity.errors import TrinityError

SUPPORTED_MEGATRON_CORE = "0.19.2"
OVERRIDE_VARIABLE = "MEGATRON_TRINITY_ALLOW_UNTESTED_MEGATRON"


def installed_megatron_core() -> str:
    """The version of the installed megatron-core.

    Raises:
        TrinityError: it is not installed.
    """
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise TrinityError(
            f"megatron-core is not installed: pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
        ) from error


def check_version(installed: str) -> None:
    """Refuse any megatron-core but the supported one, unless the environment overrides it.

    Raises:
        TrinityError: `installed` is another version and the override is not set.
    """
    if installed == SUPPORTED_MEGATRON_CORE:
        return
    if os.environ.get(OVERRIDE_VARIABLE) == "1":
        warnings.warn(
            f"megatron-core {installed} is untested: the adaptations were written for "
            f"{SUPPORTED_MEGATRON_CORE}, and {OVERRIDE_VARIABLE}=1 lets them run on it",
            stacklevel=3,
        )
        return
    raise TrinityError(
        f"megatron-core {installed} is installed, but {SUPPORTED_MEGATRON_CORE} is the version "
        f"supported: pip install megatron-core=={SUPPORTED_MEGATRON_CORE}, or set "
        f"{OVERRIDE_VARIABLE}=1 to try the installed one at your own risk"
    )
