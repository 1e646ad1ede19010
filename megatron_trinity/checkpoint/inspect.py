"""What is in a checkpoint, and whether it is whole; without a model, and almost without memory."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_trinity.checkpoint.conversion.rows import row_count
from megatron_trinity.checkpoint.iterations import METADATA, iterations
from megatron_trinity.checkpoint.torch_dist.read import (
    OPTIMIZER_PREFIX,
    TorchDistCheckpoint,
    TorchDistTensors,
)
from megatron_trinity.checkpoint.whole.structure import (
    manifest_faults,
    object_faults,
    structure_faults,
)

MODEL = (
    "preset",
    "num_layers",
    "num_dense_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_router_topk",
    "num_shared_experts",
    "moe_ffn_hidden_size",
    "global_attn_every_n_layers",
    "sliding_window",
    "vocab_size",
    "padded_vocab_size",
    "seq_length",
)
"""Arguments that say which model it is."""

LAYOUT = {
    "ranks": "world_size",
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "pipeline layout": "pipeline_model_parallel_layout",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "CP": "context_parallel_size",
    "DP": "data_parallel_size",
    "sequence parallel": "sequence_parallel",
}
"""Short name to argument."""

GROUPS = {
    "norms": "norm",
    "embedding": "embedding.",
    "LM head": "output_layer.",
    "attention": ".self_attention.",
    "router": ".mlp.router.",
    "shared experts": ".mlp.shared_experts.",
    "routed experts": ".mlp.experts.",
    "dense MLP": ".mlp.",
}
"""Group of parameters to what is in their names; the first that fits."""

EXTRA = "._extra_state"
"""In the key of an object beside a layer's weights."""
BIAS = ".expert_bias"
"""End of the name of a model's tensor that is no parameter."""


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint; fit for JSON.

    Attributes:
        path: directory of the iteration.
        iteration: optimizer steps that the run had taken.
        samples, tokens: that it had been trained on.
        model: which model it is, by Megatron's names of arguments.
        parameters: number of parameters by group, the padding of the vocabulary included.
        layout: of the run that wrote it.
        optimizer: the same for its optimizer and precision.
        files: name to bytes.
        tensor_bytes: bytes of tensors of the `model` and of the `optimizer`, by dtype.
        rest_bytes: what else the files take.
        extra_states: objects that linear layers have saved beside their weights, Transformer
            Engine's scales of FP8 among them, by their names.
        faults: why it is not whole, a line each.
        unreadable: what is whole and keeps training from loading it, a line each.
    """

    path: str
    iteration: int
    samples: int
    tokens: int
    model: dict[str, Any]
    parameters: dict[str, int]
    layout: dict[str, Any]
    optimizer: dict[str, Any]
    files: dict[str, int]
    tensor_bytes: dict[str, dict[str, int]]
    rest_bytes: int
    extra_states: list[str]
    faults: list[str]
    unreadable: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether it is what was saved."""
        return not self.faults


@dataclass(frozen=True)
class Iteration:
    """A checkpoint of a run's directory, judged by its manifest and by the sizes of its files.

    Attributes:
        fault: why it is not whole, if it is not.
    """

    name: str
    fault: str | None


def inspect_checkpoint(directory: Path, checksums: bool = False) -> Inspection:
    """Look at the newest iteration of a run's directory, or at the iteration `directory`.

    Args:
        checksums: read every file through, and compare with the manifest.

    Raises:
        TrinityError: there is no checkpoint of a Trinity model, or it cannot be read at all.
    """
    checkpoint = TorchDistCheckpoint(directory)
    args = checkpoint.args
    files = {path.name: path.stat().st_size for path in sorted(checkpoint.path.iterdir())}
    tensor_bytes = _tensor_bytes(checkpoint)
    samples = int(_get(args, "consumed_train_samples") or 0)
    # Both name what is wrong with a file; once is enough.
    found = [*manifest_faults(checkpoint.path, checksums), *structure_faults(checkpoint)]
    return Inspection(
        path=str(checkpoint.path),
        iteration=checkpoint.iteration,
        samples=samples,
        tokens=samples * args.seq_length,
        model={name: _get(args, name) for name in MODEL},
        parameters=_parameters(checkpoint),
        layout={name: _get(args, argument) for name, argument in LAYOUT.items()},
        optimizer=_optimizer(args),
        files=files,
        tensor_bytes=tensor_bytes,
        rest_bytes=sum(files.values()) - sum(sum(kind.values()) for kind in tensor_bytes.values()),
        extra_states=sorted({k.split("/")[0] for k in checkpoint.object_keys() if EXTRA in k}),
        faults=list(dict.fromkeys(found)),
        unreadable=[] if found else list(object_faults(checkpoint)),
    )


def iterations_of(directory: Path) -> Iterator[Iteration]:
    """The checkpoints in a run's directory, oldest first."""
    for path in reversed(iterations(directory)):
        if (path / METADATA).is_file():
            fault = next(manifest_faults(path, checksums=False), None)
        else:
            fault = f"{METADATA} is missing"
        yield Iteration(path.name, fault)


def group_of_parameter(key: str) -> str:
    """The group of `GROUPS` that a tensor of the model is in; `other` if in none."""
    return next((group for group, part in GROUPS.items() if part in key), "other")


def nbytes(stored: TorchDistTensors, key: str) -> int:
    """Bytes of a whole tensor's values."""
    shape = stored.shape(key)
    return row_count(shape) * shape[-1] * stored.dtype(key).itemsize


def _parameters(stored: TorchDistTensors) -> dict[str, int]:
    groups = dict.fromkeys((*GROUPS, "other"), 0)
    for key in stored.model_keys():
        if not key.endswith(BIAS):
            groups[group_of_parameter(key)] += nbytes(stored, key) // stored.dtype(key).itemsize
    return {group: count for group, count in groups.items() if count}


def _tensor_bytes(stored: TorchDistTensors) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {"model": Counter(), "optimizer": Counter()}
    for key in stored.tensor_keys():
        kind = "optimizer" if key.startswith(OPTIMIZER_PREFIX) else "model"
        found[kind][str(stored.dtype(key)).removeprefix("torch.")] += nbytes(stored, key)
    return {kind: dict(counted) for kind, counted in found.items()}


def _optimizer(args: Namespace) -> dict[str, Any]:
    sharded = _get(args, "use_distributed_optimizer") or _get(
        args, "use_layer_wise_distributed_optimizer"
    )
    return {
        "optimizer": _get(args, "optimizer"),
        "sharded": bool(sharded),
        "instances": _get(args, "num_distributed_optimizer_instances"),
        "precision": "bf16" if args.bf16 else "fp32",
        "global batch": _get(args, "global_batch_size"),
        "micro-batch": _get(args, "micro_batch_size"),
    }


def _get(args: Namespace, name: str) -> Any:
    """An argument in a form that JSON has; None if the run that wrote it did not know it."""
    value = getattr(args, name, None)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
