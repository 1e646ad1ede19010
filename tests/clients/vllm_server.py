"""A server of vLLM on this machine alone, and what it answers."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

START_LIMIT = 900
"""Seconds until it has to answer: half a minute on two idle cores, many on busy ones."""
ANSWER_LIMIT = 300
PATIENCE = 15
"""Seconds to end by itself."""
PR_SET_PDEATHSIG = 1
PLUGIN = "plain_fp8"

_open = build_opener(ProxyHandler({})).open  # what is on this machine is behind no proxy


@dataclass(frozen=True)
class Answer:
    """A greedy continuation.

    Attributes:
        prompt: token ids.
        tokens: those that follow.
        logprobs: natural logarithm of the probability of each of `tokens`.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Server:
    """Where a server answers."""

    url: str

    def complete(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], tokens: int
    ) -> list[Answer]:
        """So many tokens after each prompt, without an end before."""
        body = {
            "model": "exported",
            "prompt": prompts,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        request = Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with _open(request, timeout=ANSWER_LIMIT) as response:
            choices: list[dict[str, Any]] = json.load(response)["choices"]
        return [
            Answer(
                tuple(choice["prompt_token_ids"]),
                tuple(choice["token_ids"]),
                tuple(choice["logprobs"]["token_logprobs"]),
            )
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]


@contextmanager
def serve(python: Path, directory: Path, work: Path, dtype: str) -> Iterator[Server]:
    """Serve a directory until the block is left.

    Args:
        python: interpreter of an environment with vLLM.
        work: an empty directory for its log and its files.
        dtype: what it computes in.

    Raises:
        RuntimeError: it does not start; the message has the end of its log.
    """
    port = _free_port()
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", directory),
        *("--served-model-name", "exported", "--dtype", dtype, "--enforce-eager"),
        *("--host", "127.0.0.1", "--port", port, "--disable-uvicorn-access-log"),
    ]
    log = work / "server.log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=_environment(work),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        _wait(server, process, log)
        yield server
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _environment(work: Path) -> dict[str, str]:
    """For the server: nothing of the tests' own environment, no network, and the plugin."""
    plugin = work / "plugin"
    metadata = plugin / f"{PLUGIN}-0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name(f"{PLUGIN}.py"), plugin)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    entry = f"[vllm.general_plugins]\n{PLUGIN} = {PLUGIN}:register\n"
    (metadata / "entry_points.txt").write_text(entry)
    kept = {
        name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TMPDIR") if name in os.environ
    }
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(plugin),
        # Else some functions are compiled all the same, which takes a compiler, and a path to the
        # environment without spaces.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "VLLM_CONFIG_ROOT": str(work / "config"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": PLUGIN,
    }


def _end_with_parent() -> None:
    """However the tests end, the server is told to."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with _open(f"{server.url}/health", timeout=10):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    code = process.poll()
    what = f"is not up after {START_LIMIT} s" if code is None else f"ended with {code}"
    lines = log.read_text(errors="replace").splitlines()
    raise RuntimeError("\n".join([f"vLLM {what}; the end of its log:", *lines[-60:]]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # the whole group is gone
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
