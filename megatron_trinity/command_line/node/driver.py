"""What the driver counts: devices, memory errors, throttling, NVLink."""

from __future__ import annotations

import re

from megatron_trinity.command_line.node.finding import (
    NOT_HERE,
    Finding,
    Floors,
    answer_of,
    judged,
    of_device,
)

FIELDS = (
    "index",
    "name",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "temperature.gpu",
    "clocks_throttle_reasons.hw_slowdown",
)
DEVICES = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
LINKS = ("nvidia-smi", "nvlink", "--status")


def driver_findings(floors: Floors) -> list[Finding]:
    """All that nvidia-smi tells."""
    code, text = answer_of(DEVICES)
    if code is None:
        return [Finding("devices", NOT_HERE, text, of_gpu=True)]
    if code:
        last = text.strip().splitlines()[-1:] or [f"exit code {code}"]
        return [judged("devices", False, f"nvidia-smi: {last[0]}", of_gpu=True)]
    rows = [
        dict(zip(FIELDS, map(str.strip, line.split(",")), strict=True))
        for line in text.strip().splitlines()
    ]
    names = sorted({row["name"] for row in rows})
    wanted = of_device(floors, names[0] if names else "")
    number = wanted.get("number", 1)
    found = judged(
        "devices",
        len(rows) >= number and len(names) == 1,
        f"{len(rows)} of {number}: {', '.join(names)}",
        of_gpu=True,
    )
    return [found, *_of_each(rows, floors), *_links(wanted, len(rows))]


def _of_each(rows: list[dict[str, str]], floors: Floors) -> list[Finding]:
    errors = [(row["index"], _number(row["ecc.errors.uncorrected.volatile.total"])) for row in rows]
    rows_bad = [
        row["index"]
        for row in rows
        if "Yes" in (row["remapped_rows.pending"], row["remapped_rows.failure"])
        or _number(row["remapped_rows.pending"])
        or _number(row["remapped_rows.failure"])
    ]
    slow = [r["index"] for r in rows if r["clocks_throttle_reasons.hw_slowdown"] == "Active"]
    hottest = max((_number(row["temperature.gpu"]) for row in rows), default=0)
    with_errors = [f"GPU {index}: {count}" for index, count in errors if count]
    return [
        judged(
            "ECC, uncorrected",
            not with_errors,
            ", ".join(with_errors) or "none since the driver was loaded",
            of_gpu=True,
        ),
        judged(
            "ECC, remapped rows",
            not rows_bad,
            f"pending or failed on GPU {', '.join(rows_bad)}" if rows_bad else "none pending",
            of_gpu=True,
        ),
        judged(
            "throttled by hardware",
            not slow,
            f"GPU {', '.join(slow)}" if slow else "none",
            of_gpu=True,
        ),
        judged(
            "temperature",
            hottest <= floors["temperature"],
            f"{hottest} C, at most {floors['temperature']}",
            of_gpu=True,
        ),
    ]


def _links(wanted: Floors, devices: int) -> list[Finding]:
    links = wanted.get("nvlinks", 0)
    if not links or devices < 2:
        return [Finding("NVLink", NOT_HERE, "a single device, or none with it")]
    code, text = answer_of(LINKS)
    if code:
        return [judged("NVLink", False, text.strip().splitlines()[-1], of_gpu=True)]
    active = {
        part.split(":")[0]: len(re.findall(r"Link \d+: [\d.]+ GB/s", part))
        for part in re.split(r"^GPU ", text, flags=re.MULTILINE)[1:]
    }
    few = [f"GPU {index}: {count}" for index, count in active.items() if count < links]
    good = len(active) == devices and not few
    words = ", ".join(few) or f"on {len(active)} devices"
    return [judged("NVLink", good, f"{words}, of {links} links", of_gpu=True)]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # [N/A]: the device has no such counter
