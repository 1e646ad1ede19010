"""Runs that were never trained: events of any length, for what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS = 6, 8
BEGUN = 1_700_000_000.0


def write_run(folder: Path, steps: int, seed: int = 1, **arguments: Any) -> Path:
    """A run of `steps` that was killed at two thirds and went on from a half."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "events.jsonl", "w") as file:
        for event in made_events(steps, seed, arguments):
            file.write(json.dumps(event) + "\n")
    return folder


def made_events(steps: int, seed: int, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    noise = np.random.default_rng(seed).normal(size=(steps + 1, 8))
    killed, behind = max(1, steps * 2 // 3), steps // 2
    clock = BEGUN
    pictures = max(1, steps // 100)
    for first, last, begin in ((1, killed, 0), (behind + 1, steps, behind)):
        launched, clock = clock, clock + 30
        yield _start(begin, launched, clock, steps, arguments)
        for number in range(first, last + 1):
            clock += 1.0 + 0.05 * float(np.abs(noise[number, 0]))
            yield _step(number, steps, clock, noise[number])
            if number % pictures == 0:
                yield _loads(number, clock, noise[number])
            if number % max(2, steps // 20) == 0:
                clock += 3
                loss = 2.0 + 8 / (1 + number / 50)
                yield {
                    "kind": "evaluation",
                    "time": clock,
                    "iteration": number,
                    "seconds": 3.0,
                    "set": "",
                    "of_test": False,
                    "values": {"lm loss": loss},
                }
                clock += 2
                yield {
                    "kind": "save",
                    "time": clock,
                    "iteration": number,
                    "seconds": 2.0,
                    "background": False,
                }
        if last == killed:
            line = f"iteration {killed} is a spike: the lm loss is 9.1, above 4.2; it is applied"
            yield {
                "kind": "alarm",
                "time": clock,
                "iteration": killed,
                "what": "spike",
                "line": line,
            }
            clock += 60
    yield {"kind": "end", "time": clock, "iteration": steps, "code": 0, "line": ""}


def _start(
    behind: int, launched: float, time: float, steps: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    flags = {"lr": 0.004, "clip-grad": 1.0, "global-batch-size": 32, **arguments}
    return {
        "kind": "start",
        "time": time,
        "schema": 1,
        "iteration": behind,
        "launched": launched,
        "world_size": 2,
        "host": "node-1",
        "command": ["--preset", "tiny", "--lr", "4e-3"],
        "arguments": {"megatron": flags, "trinity": {"load-balancing": "smebu"}},
        "versions": {"python": "3.13.1", "torch": "2.13.0", "megatron-core": "0.19.2"},
        "git": {"commit": "0123456789abcdef", "changed": False},
        "parameters": [3_500_000, 1_200_000],
        "planned_peak": 3 * 2**30,
        "layers": list(range(2, 2 + LAYERS)),
        "train_iters": steps,
        "tokens_per_sample": 256,
    }


def _step(number: int, steps: int, time: float, noise: np.ndarray) -> dict[str, Any]:
    share = number / steps
    loss = 2.0 + 8 / (1 + number / 50) + 0.05 * float(noise[1])
    violations = [
        round(float(0.3 + 1.5 / (1 + number / 80) + 0.05 * abs(noise[n]) + 0.05 * n), 4)
        for n in range(LAYERS)
    ]
    rate = 0.004 * min(1.0, 20 * share) * (1 if share < 0.8 else (1 - share) / 0.2)
    values = {
        "lm loss": loss,
        "z loss": 1e-4 * loss,
        "sequence loss": 1e-3 + 1e-4 * float(abs(noise[2])),
        "learning-rate": rate,
        "adamw learning rate": rate / 2,
        "grad-norm": 0.4 + 0.2 * float(abs(noise[3])),
        "tokens per second": 8192 / (1.0 + 0.05 * float(abs(noise[0]))),
        "throughput per GPU (TFLOP/s/GPU)": 400 / (1.0 + 0.05 * float(abs(noise[0]))),
        "peak memory (GiB)": 61.5,
        "max violation": max(violations),
        "mean violation": 0.5 * max(violations),
        "unused experts": int(max(0, 3 - number // 20)),
        "max expert bias": 0.1 * share,
        "batch heterogeneity": 0.1 + 0.02 * float(abs(noise[4])),
        "max logit": 10 + 5 * share + float(noise[5]),
        "mean logit": -1.0,
    }
    return {
        "kind": "step",
        "time": time,
        "iteration": number,
        "applied": True,
        "tokens": 8192,
        "seconds": 1.0 + 0.05 * float(np.abs(noise[0])),
        "samples": 32 * number,
        "values": values,
        "max violation": violations,
    }


def _loads(number: int, time: float, noise: np.ndarray) -> dict[str, Any]:
    counts = [
        [int(2048 * (1 + 0.3 * np.sin(e + layer) / (1 + number / 200))) for e in range(EXPERTS)]
        for layer in range(LAYERS)
    ]
    bias = [[round(0.01 * float(noise[e]), 5) for e in range(EXPERTS)] for _ in range(LAYERS)]
    return {"kind": "loads", "time": time, "iteration": number, "counts": counts, "bias": bias}
