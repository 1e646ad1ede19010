"""What autograd holds behind a forward pass of the model, on a CPU in the forms of a GPU."""

from __future__ import annotations

import weakref
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.gpu_forms import as_if_compiled, as_if_flexible, as_if_kernel
from tests.transformer_engine.models import packed


class Held:
    """Saved tensors that are alive, each storage once, by what `place` was when it was saved."""

    def __init__(self, left_out: Iterable[Tensor]) -> None:
        self.place = ""
        self.modules: list[nn.Module] = []
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self._found: dict[int, tuple[str, Any, tuple[int, ...]]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._found.get(key)
        if key not in self._left_out and (known is None or known[1]() is None):
            self._found[key] = self.place, weakref.ref(storage), tuple(tensor.shape)
        return tensor

    def __enter__(self) -> Held:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def tensors(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Place, bytes and a shape of each that is alive."""
        for place, reference, shape in self._found.values():
            storage = reference()
            if storage is not None:
                yield place, storage.nbytes(), shape

    def copies(self) -> Iterator[int]:
        """Bytes of the copies in FP8 that Transformer Engine's layers have of their weights."""
        for module in self.modules:
            for copy in getattr(module, "_fp8_workspaces", {}).values():
                for value in vars(copy).values():
                    if isinstance(value, Tensor):
                        yield value.untyped_storage().nbytes()

    def by_place(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for place, size, _ in self.tensors():
            found[place] = found.get(place, 0) + size
        return found


@contextmanager
def gpu_forms(half: bool) -> Iterator[None]:
    """The paths of a GPU, as far as memory depends on them."""
    with ExitStack() as stack:
        if half:
            for form in (as_if_kernel(), as_if_compiled(), as_if_flexible(128)):
                stack.enter_context(form)
        yield


def forward(
    args: Namespace, groups: Any, documents: Sequence[Sequence[int]] | None = None
) -> tuple[Held, Tensor]:
    """A forward pass with labels of a model that is one chunk; its output keeps the rest alive."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    from megatron_trinity.model.builder import TrinityModelBuilder
    from megatron_trinity.model.config import model_config_from_args

    model_parallel_cuda_manual_seed(1)
    model: Any = TrinityModelBuilder(model_config_from_args(args)).build_model(groups)
    inner = model
    if args.bf16:
        model = Float16Module(model.config, model)
    held = Held((*inner.parameters(), *inner.buffers()))

    held.modules = list(inner.modules())

    def leave(*_: Any) -> None:
        held.place = ""

    for number, layer in enumerate(inner.decoder.layers):

        def enter(*_: Any, number: int = number) -> None:
            held.place = str(number)

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    # Of this rank: what is sent to the others does not depend on their tokens.
    batch, length = args.micro_batch_size, args.seq_length // args.context_parallel_size
    device = next(inner.parameters()).device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocab_size, (batch, length), generator=generator).to(device)
    positions = torch.arange(length, device=device).expand(batch, length)
    model.train()
    with held:
        output = model(
            tokens,
            positions,
            None,
            labels=tokens,
            packed_seq_params=packed(documents, length, device),
        )
    return held, output
