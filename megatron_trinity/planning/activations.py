"""Bytes that the forward pass of a micro-batch keeps for the backward pass, by parts of a chunk.

Each tensor that autograd holds is counted once, by the part that makes or first needs it. Experts
are taken to get equal shares of the tokens.

Shapes, of one rank: t tokens of hidden states, T of the sublayers between (more under sequence
parallelism), r rows of routed experts, h hidden size, n query heads, g query groups, d head_dim,
f width of an MLP, E experts, k of a token, c bytes of a value.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_trinity.arguments.precision import PRECISIONS
from megatron_trinity.planning.kernels import Kernels
from megatron_trinity.planning.rank_parameters import model_dtype
from megatron_trinity.planning.sizes import LayerKind, ModelSizes
from megatron_trinity.planning.stages import Chunk

FP32, INT64 = 4, 8
SCALE_BYTES = {"blockwise": FP32 / 128, "mxfp8": 1 / 32}
"""Of each value in FP8, by recipe; a scale for a whole tensor is nothing."""

NORMS, ATTENTION, DENSE, ROUTER, EXPERTS, SHARED = PARTS = (
    "norms",
    "attention",
    "dense MLP",
    "router and dispatch",
    "routed experts",
    "shared experts",
)
INPUT, EMBEDDING, HEAD = "layer inputs to recompute from", "embedding", "head and loss"


def recomputed_modules(args: Namespace) -> tuple[str, ...]:
    """Of selective recompute; Megatron's choice where none are named."""
    if args.recompute_granularity != "selective":
        return ()
    return tuple(args.recompute_modules or ("core_attn",))


@dataclass(frozen=True)
class Activations:
    """Of one rank and one micro-batch."""

    args: Namespace
    kernels: Kernels

    @cached_property
    def sizes(self) -> ModelSizes:
        return ModelSizes.from_args(self.args)

    @cached_property
    def value(self) -> int:
        """Bytes of a value of the model's dtype, c."""
        size: int = model_dtype(self.args).itemsize
        return size

    @cached_property
    def whole_tokens(self) -> int:
        """T."""
        tokens = self.args.micro_batch_size * self.args.seq_length
        return int(tokens // self.args.context_parallel_size)

    @cached_property
    def tokens(self) -> int:
        """t."""
        parts = self.args.tensor_model_parallel_size if self.args.sequence_parallel else 1
        return int(self.whole_tokens // parts)

    @cached_property
    def rows(self) -> int:
        """r, if every expert gets as many."""
        return int(self.tokens * self.sizes.topk * self.args.expert_tensor_parallel_size)

    @property
    def hidden(self) -> int:
        """Bytes of hidden states."""
        return self.tokens * self.sizes.hidden_size * self.value

    def layer(self, kind: LayerKind, modules: Iterable[str] = ()) -> Counter[str]:
        """Of a layer that is not recomputed as a whole; `modules` of it are."""
        modules = set(modules)
        kept = Counter({ATTENTION: self._attention(kind.is_global, "core_attn" in modules)})
        # What goes into each of the four norms, and what two of them make.
        kept[NORMS] = 4 * self.hidden + 4 * self.tokens * FP32
        if "layernorm" in modules:
            kept[NORMS] -= 2 * self.tokens * FP32
        else:
            kept[NORMS] += self._linear_input(self.hidden)  # of queries, keys and values
        if not kind.is_moe:
            if "layernorm" not in modules:
                recomputed = "mlp" in modules
                kept[NORMS] += self.hidden if recomputed else self._linear_input(self.hidden)
            if "mlp" not in modules:
                kept[DENSE] = self._swiglu(self.sizes.ffn_hidden_size)
            return kept
        if "moe" in modules:
            kept[ROUTER] = 0 if "layernorm" in modules else self.hidden
            return kept
        kept[ROUTER] = self._router() + (0 if "layernorm" in modules else self.hidden)
        kept[EXPERTS] = self._experts()
        if self.sizes.num_shared_experts and "shared_experts" not in modules:
            width = self.sizes.num_shared_experts * self.sizes.moe_ffn_hidden_size
            kept[SHARED] = self._swiglu(width)
            if not self._keeps_originals:
                kept[SHARED] += self._linear_input(self.hidden)
        return kept

    def chunk(self, chunk: Chunk) -> Counter[str]:
        """Of all layers of a chunk, as `--recompute-*` say, and what is around them."""
        args = self.args
        kept: Counter[str] = Counter()
        if args.recompute_granularity == "full":
            kept += self._recomputed(chunk.kinds)
        else:
            modules = recomputed_modules(args)
            for kind in chunk.kinds:
                kept += self.layer(kind, modules)
        if chunk.has_embedding:
            kept[EMBEDDING] += args.micro_batch_size * args.seq_length * INT64
        if chunk.has_lm_head:
            kept[HEAD] += self.hidden + self.tokens * FP32 + self._loss()
        return kept

    @property
    def rope(self) -> int:
        """Angles of positions, which all layers share."""
        length = self.args.seq_length // self.args.context_parallel_size
        return int(length * self.sizes.head_dim * FP32)

    def _recomputed(self, kinds: Sequence[LayerKind]) -> Counter[str]:
        """Of full recompute: inputs of runs of layers, or of the first layers alone."""
        args, number = self.args, self.args.recompute_num_layers
        if args.recompute_method == "uniform":
            return Counter({INPUT: math.ceil(len(kinds) / number) * self.hidden})
        kept = Counter({INPUT: min(number, len(kinds)) * self.hidden})
        for kind in kinds[number:]:
            kept += self.layer(kind)
        return kept

    def _linear_input(self, size: int) -> int:
        """What a linear layer keeps of an input of so many bytes; in FP8 the rounded copy that the
        gradient of its weight needs, with its scales."""
        if not self.kernels.fp8:
            return size
        values = size // self.value
        return int(values * (1 + SCALE_BYTES.get(self.args.fp8_recipe, 0)))

    @property
    def _keeps_originals(self) -> bool:
        """Whether two layers keep inputs as they are, which somebody else keeps as well."""
        return not self.kernels.fp8 or self.args.fp8_recipe != "delayed"

    def _attention(self, is_global: bool, recomputed: bool) -> int:
        sizes, c = self.sizes, self.value
        tensor = self.args.tensor_model_parallel_size
        tokens, d = self.whole_tokens, sizes.head_dim
        heads = sizes.num_attention_heads // tensor
        groups = max(sizes.num_query_groups // tensor, 1)
        queries, keys = tokens * heads * d * c, tokens * groups * d * c
        # Queries, gates, keys and values as one, 1/rms.
        kept = 2 * queries + 2 * keys + tokens * (heads + groups) * FP32
        if groups > 1:
            kept += queries  # ahead of their norm: those of several groups are no view
        if not is_global and not self.kernels.rope:
            length = self.args.seq_length // self.args.context_parallel_size
            kept += 4 * length * d * c  # sines and cosines, of queries and of keys
        kept += tokens * heads * d * FP32  # sigmoid of the gate
        # The input of the output's projection.
        kept += queries if self._keeps_originals else self._linear_input(queries)
        return kept + self._core(is_global, recomputed, queries, keys, heads, groups)

    def _core(
        self, is_global: bool, recomputed: bool, queries: int, keys: int, heads: int, groups: int
    ) -> int:
        """The core attention, with its output, which the gate needs in any case."""
        args, window = self.args, self.sizes.window
        if recomputed:
            return 2 * queries + keys  # and values, as they are
        local = not is_global and window < args.seq_length
        if local and not self.kernels.attention:
            return self._in_chunks(heads, groups) + 2 * queries
        # Queries behind RoPE, the output, and its logsumexp.
        kept = 2 * queries + self.whole_tokens * heads * FP32
        is_flexible = local or args.context_parallel_size > 1
        if is_flexible and not self.kernels.transformer_engine:
            kept += self.whole_tokens * heads * FP32  # the largest scores as well
        if args.context_parallel_size == 1:
            # Values are there, but Transformer Engine makes them contiguous.
            return kept + keys * (1 + self.kernels.transformer_engine)
        kept += queries  # what comes back from the exchange
        if "a2a" in args.cp_comm_type:
            return kept + 2 * keys
        return kept + 2 * keys * self._gathered(window if local else None) // self.whole_tokens

    def _gathered(self, window: int | None) -> int:
        """Keys that an all-gather or an exchange of windows brings to a rank, with its own, over
        the micro-batch; of the rank with most."""
        batch, length = self.args.micro_batch_size, self.args.seq_length
        ranks = self.args.context_parallel_size
        if window is None:
            return int(batch * length)
        part = length // (2 * ranks)
        return int(
            max(
                batch * sum(part + min(window - 1, chunk * part) for chunk in chunks)
                for chunks in ((rank, 2 * ranks - 1 - rank) for rank in range(ranks))
            )
        )

    def _in_chunks(self, heads: int, groups: int) -> int:
        """Local layers without a kernel of their own: two chunks of keys for each of queries."""
        batch, length = self.args.micro_batch_size, self.args.seq_length
        window, d, c = self.sizes.window, self.sizes.head_dim, self.value
        first = window * (groups * d * c + heads * (d * c + FP32))
        chunks = math.ceil(length / window) - 1
        keys = 2 * 2 * groups * d * c
        of_chunk = window * (keys + heads * (2 * d * c + FP32))
        return int(batch * (first + chunks * of_chunk) + window * 2 * window * c)

    def _swiglu(self, width: int) -> int:
        """Between gate and up projections and the down projection, and what that keeps."""
        size = self.whole_tokens * width // self.args.tensor_model_parallel_size * self.value
        # Without a kernel: silu of the gate, and a copy of both halves.
        apart = 0 if self.kernels.swiglu else 2 * size
        return 2 * size + apart + self._linear_input(size)

    def _router(self) -> int:
        sizes, tokens = self.sizes, self.tokens
        scores = tokens * sizes.num_experts * FP32
        chosen = tokens * sizes.topk * (INT64 + FP32) + tokens * FP32
        auxiliary = 3 * scores if self.args.seq_aux_loss_coeff else 0
        order = tokens * (sizes.num_experts + sizes.topk) * INT64
        return scores + chosen + auxiliary + order

    def _experts(self) -> int:
        sizes, c, rows = self.sizes, self.value, self.rows
        if self.kernels.fp8:  # the rows of each expert are padded
            multiple = PRECISIONS[self.args.precision].multiple
            rows += sizes.num_experts // self.args.expert_model_parallel_size * (multiple - 1) // 2
        width = sizes.moe_ffn_hidden_size // self.args.expert_tensor_parallel_size
        first = self._linear_input(rows * sizes.hidden_size * c)
        both = rows * 2 * width * c + rows * FP32
        return first + both + self._linear_input(rows * width * c)

    def _loss(self) -> int:
        """Hidden states, labels, four numbers a token and a factor; the logits of one chunk."""
        from megatron_trinity.model.loss import chunk_length

        args, tokens = self.args, self.whole_tokens
        width = args.padded_vocab_size // args.tensor_model_parallel_size
        kept = tokens * (self.sizes.hidden_size * self.value + INT64 + 5 * FP32)
        chunk = chunk_length(tokens, width, args.loss_chunk_size, self.bytes_of_logit)
        if chunk >= tokens:
            kept += tokens * width * (self.value if self.kernels.loss else FP32)
        return kept

    @property
    def bytes_of_logit(self) -> int:
        """As `model.loss.bytes_of_logit`."""
        if self.kernels.loss:
            return 2 * self.value
        return self.value + FP32 * (self.value != FP32)
