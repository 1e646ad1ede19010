"""One rank of a pool: a process that has imported Megatron and runs the functions it is sent."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# By this one the pool asks a hung rank for its stack; training has its own use for SIGUSR1.
STACK_SIGNAL = signal.SIGRTMIN + 1
SEED = 1234


@dataclass(frozen=True)
class Call:
    """`function(rank, world_size, *arguments)`, and the file through which its ranks meet."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    rendezvous: Path
    timeout: float  # seconds


@dataclass(frozen=True)
class Answer:
    """What one rank has to say to a call: a result, or the traceback of what was raised."""

    result: Any = None
    error: str | None = None


def log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def serve(
    connection: Connection, rank: int, world_size: int, folder: Path, load: Callable[[], None]
) -> None:
    """Answer calls until the other end of `connection` closes."""
    _become_a_rank(rank, world_size, folder)
    try:
        load()
        answer = Answer()
    except Exception:
        answer = Answer(error=traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(request, rank, world_size))


def _become_a_rank(rank: int, world_size: int, folder: Path) -> None:
    # A group of its own: Ctrl-C reaches pytest alone, which then ends the rank with its children.
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_pytest, daemon=True).start()

    log = os.open(log_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.register(STACK_SIGNAL, all_threads=True)

    # As in a trainer started by torchrun: data loaders fork their workers.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        # Else gloo looks up the host's own name, which need not resolve.
        GLOO_SOCKET_IFNAME="lo",
    )


def _end_with_pytest() -> None:
    """Leave no orphan, even in the middle of a collective and however pytest ended."""
    pytest_process = multiprocessing.parent_process()
    assert pytest_process is not None
    wait([pytest_process.sentinel])
    os.killpg(0, signal.SIGKILL)


def load_megatron() -> None:
    """Adapt Megatron and import it and the trainer, in the order in which the entry point does."""
    import torch

    from megatron_trinity.upstream import adapt_megatron

    torch.set_num_threads(1)
    adapt_megatron()
    importlib.import_module("megatron.training.training")
    # What a first training run would import else, for seconds on every rank.
    importlib.import_module("megatron_trinity.training.pretrain")
    importlib.import_module("torch._dynamo")


def _answer(request: bytes, rank: int, world_size: int) -> bytes:
    try:
        call: Call = pickle.loads(request)
        _reset(call, rank, world_size)
        # Within the try: a result that cannot be pickled is this rank's failure as well.
        return pickle.dumps(Answer(result=call.function(rank, world_size, *call.arguments)))
    except (
        BaseException
    ):  # SystemExit as well: argument parsing raises it, and the rank has to live
        return pickle.dumps(Answer(error=traceback.format_exc()))


def _let_go_of_models() -> None:
    """Break cycles through autograd, which the collector cannot see, and empty caches of methods.

    A parameter's gradient hooks hold Megatron's wrapper of the model, and the distributed optimizer
    holds views of parameters. With a model live its process groups, of which each has threads that
    wake up a hundred times a second.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    for method in vars(RotaryEmbedding).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    wrappers = [o for o in gc.get_objects() if isinstance(o, DistributedDataParallel)]
    for referrer in gc.get_referrers(*wrappers) if wrappers else []:
        if isinstance(referrer, types.CellType):
            referrer.cell_contents = None


def _forget_scales() -> None:
    """Of delayed scaling: it keeps those of every model, with groups, and reduces them together."""
    quantization: Any = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()


def _reset(call: Call, rank: int, world_size: int) -> None:
    """Forget the previous call: Megatron's global state, process groups, random numbers, garbage.

    The old groups go here and not at the end of the call, since by now every rank has answered it
    and none still waits for a message. New ones cost little and no stale message can reach them.
    """
    import numpy as np
    import torch
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training.training import destroy_global_state

    destroy_global_state()
    # A run with fp32 accumulation leaves its own function there.
    param_and_grad_buffer.dist_reduce_scatter_func = dist.reduce_scatter_tensor
    destroy_moe_metrics_tracker()
    _let_go_of_models()
    _forget_scales()
    initialize_rng_tracker(force_reset=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(call.rendezvous), world_size),
        rank=rank,
        world_size=world_size,
        # Longer than the pool waits, so that it is the pool that reports a hang, with the stacks.
        timeout=datetime.timedelta(seconds=call.timeout + 60),
    )
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - what is under test uses the global generator
    torch.manual_seed(SEED)
