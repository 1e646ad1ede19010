"""A directory of Hugging Face where a checkpoint of Megatron is expected."""

from __future__ import annotations

from pathlib import Path


def hugging_face_hint(directory: Path) -> str | None:
    """What to do with a directory of Hugging Face before it is loaded; None if it is none."""
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors*")):
        return None
    return (
        f"{directory} is a Hugging Face directory; make a checkpoint of it with "
        f"tools/import_hf.py --hf {directory} --save RUN"
    )
