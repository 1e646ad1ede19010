"""The LM head as a module: on two ranks as on one, and where the weight's gradient goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_trinity.model.loss import Row
from tests.distributed.pool import RankPools

LENGTH, BATCH, HIDDEN, VOCAB, PADDED = 12, 2, 16, 43, 48


def head_of(
    weight: Tensor, *, sequence_parallel: bool = False, chunk_size: int | None = None
) -> Any:
    """The head with this rank's rows of `weight`, in a world that is one tensor-parallel group."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_trinity.model.config import TrinityConfig
    from megatron_trinity.model.head import LMHead

    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    config = TrinityConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        use_cpu_initialization=True,
        params_dtype=weight.dtype,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        loss_chunk_size=chunk_size,
    )
    linear = ColumnParallelLinear(
        HIDDEN, PADDED, config=config, init_method=config.init_method, bias=False
    )
    linear.weight.data = weight.chunk(size)[dist.get_rank()].clone()
    return LMHead.of(linear)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states `[s, b, h]`, the head `[v, h]`, labels and a mask of tokens `[b, s]`."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) < 0.7).float()
    return hidden.to(dtype), weight.to(dtype), labels, mask


def objective(losses: Tensor, mask: Tensor) -> Tensor:
    z_loss = 0.1 * losses[Row.LOG_SUM_EXP].square()
    return ((losses[Row.CROSS_ENTROPY] + z_loss) * mask).sum()


def run(
    rank: int, world_size: int, dtype: torch.dtype, parts: bool, chunk_size: int | None
) -> dict[str, Tensor]:
    """Losses `[4, b, s]`, and the gradients of this rank's hidden states and rows."""
    hidden, weight, labels, mask = inputs(dtype)
    head = head_of(weight, sequence_parallel=parts, chunk_size=chunk_size)
    hidden = hidden.chunk(world_size)[rank].clone() if parts else hidden
    hidden.requires_grad_()
    losses, bias = head(hidden, labels=labels, true_vocab_size=VOCAB)
    assert bias is None
    objective(losses, mask).backward()
    with torch.no_grad():
        again = head(hidden, labels=labels, true_vocab_size=VOCAB)[0]
    assert torch.equal(again, losses)
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": head.weight.grad}


def logits_and_gradients(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """By a plain linear layer and torch's own operations: losses, and the two gradients."""
    hidden, weight, labels, mask = inputs(dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = (hidden @ weight.T).transpose(0, 1)[..., :VOCAB].float()
    log_sum_exp = logits.logsumexp(-1)
    target = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    losses = torch.stack([log_sum_exp - target, log_sum_exp, logits.amax(-1), logits.mean(-1)])
    of_hidden, of_weight = torch.autograd.grad(objective(losses, mask), [hidden, weight])
    return losses.detach(), of_hidden, of_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize(
    ("world_size", "parts"), [(1, False), (2, False), (2, True)], ids=["one", "TP 2", "TP 2, SP"]
)
def test_losses_and_gradients_are_those_of_whole_logits(
    ranks: RankPools, world_size: int, parts: bool, chunk_size: int | None, dtype: torch.dtype
) -> None:
    losses, of_hidden, of_weight = logits_and_gradients(dtype)
    results = ranks.run(run, dtype, parts, chunk_size, world_size=world_size)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    if parts:
        results_of_hidden = [torch.cat([result["hidden"] for result in results])]
    else:
        results_of_hidden = [result["hidden"] for result in results]
    got = torch.cat([result["weight"] for result in results])
    for mine, expected in ((got, of_weight), *((x, of_hidden) for x in results_of_hidden)):
        assert mine.dtype == dtype
        error = (mine.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max()
    assert not got[VOCAB:].any()
    for result in results:
        assert result["losses"].dtype == torch.float32
        torch.testing.assert_close(result["losses"], losses, rtol=1e-6, atol=2e-6)


def collectives(
    rank: int, world_size: int, parts: bool, chunk_size: int | None
) -> list[tuple[str, int]]:
    """Kind and number of values of each, forward and backward, in order."""
    import torch.distributed as dist

    from tests.live_bytes import LiveBytes

    seen: list[tuple[str, int]] = []

    class Collectives(LiveBytes):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function.namespace == "c10d":
                first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
                seen.append((function._opname, first.numel()))
            return super().__torch_dispatch__(function, types, args, kwargs)

    hidden, weight, labels, mask = inputs()
    head = head_of(weight, sequence_parallel=parts, chunk_size=chunk_size)
    hidden = hidden.chunk(world_size)[rank].clone() if parts else hidden
    hidden.requires_grad_()
    dist.barrier()
    with Collectives():
        objective(head(hidden, labels=labels)[0], mask).backward()
    return seen


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("parts", [False, True], ids=["TP", "TP, SP"])
def test_chunks_do_not_multiply_collectives(
    ranks: RankPools, parts: bool, chunk_size: int | None
) -> None:
    tokens = LENGTH * BATCH
    for seen in ranks.run(collectives, parts, chunk_size, world_size=2):
        sizes = [size for _, size in seen]
        if parts:
            assert len(seen) == 4, seen
            assert sizes[1:3] == [tokens, 3 * tokens]
        else:
            assert sizes == [tokens, 3 * tokens, tokens * HIDDEN]


def fused(rank: int, world_size: int, chunk_size: int | None, hooked: bool) -> dict[str, Any]:
    """With Apex's kernels in torch: what two micro-batches leave in `main_grad` and `grad`."""
    from types import SimpleNamespace

    from megatron.core.tensor_parallel import layers

    calls: list[tuple[int, ...]] = []

    def accumulate(inputs: Tensor, of_output: Tensor, main_grad: Tensor) -> None:
        calls.append(tuple(main_grad.shape))
        assert all(tensor.is_contiguous() for tensor in (inputs, of_output, main_grad))
        main_grad += of_output.float().t() @ inputs.float()

    hidden, weight, labels, mask = inputs(torch.bfloat16)
    head = head_of(weight, chunk_size=chunk_size)
    head.gradient_accumulation_fusion = True
    head.weight.main_grad = torch.ones(PADDED, HIDDEN)
    if hooked:
        head.weight.grad_added_to_main_grad = False
    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
        for _ in range(2):
            head.weight.grad = None
            losses = head(hidden.requires_grad_(), labels=labels, true_vocab_size=VOCAB)[0]
            objective(losses, mask).backward()
    return {
        "main": head.weight.main_grad,
        "added": getattr(head.weight, "grad_added_to_main_grad", None),
        "shape": None if head.weight.grad is None else tuple(head.weight.grad.shape),
        "calls": calls,
    }


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_fused_accumulation_adds_to_main_grad(
    ranks: RankPools, chunk_size: int | None, hooked: bool
) -> None:
    [got] = ranks.run(fused, chunk_size, hooked, world_size=1)
    expected = logits_and_gradients(torch.bfloat16)[2].float()
    error = (got["main"] - 1 - 2 * expected).abs().max()
    assert error <= 1e-2 * expected.abs().max()
    # A hook of DistributedDataParallel runs on a gradient, and does not read it.
    assert got["added"] is (True if hooked else None)
    assert got["shape"] == ((PADDED, HIDDEN) if hooked else None)
    # Of 24 tokens by sevens, four chunks, but blocks of 16 rows cover the vocabulary in three.
    blocks = [(VOCAB, HIDDEN)] if chunk_size is None else [(16, HIDDEN)] * 2 + [(11, HIDDEN)]
    assert got["calls"] == 2 * blocks


def frozen(rank: int, world_size: int, chunk_size: int | None) -> tuple[Tensor, bool]:
    hidden, weight, labels, mask = inputs()
    head = head_of(weight, chunk_size=chunk_size)
    head.weight.requires_grad_(False)
    objective(
        head(hidden.requires_grad_(), labels=labels, true_vocab_size=VOCAB)[0], mask
    ).backward()
    assert hidden.grad is not None
    return hidden.grad, head.weight.grad is None


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_frozen_weight_has_no_gradient(ranks: RankPools, chunk_size: int | None) -> None:
    [(of_hidden, without)] = ranks.run(frozen, chunk_size, world_size=1)
    assert without
    torch.testing.assert_close(
        of_hidden, logits_and_gradients(torch.float32)[1], rtol=1e-5, atol=1e-5
    )


def hooks(rank: int, world_size: int) -> list[str]:
    hidden, weight, labels, _ = inputs()
    head = head_of(weight)
    called: list[str] = []
    head.register_forward_pre_hook(lambda *_: called.append("forward"))
    head.weight.register_post_accumulate_grad_hook(lambda *_: called.append("gradient"))
    head(hidden, labels=labels)[0].sum().backward()
    return called


def test_hooks_of_the_module_and_of_its_weight_run_once(ranks: RankPools) -> None:
    """In the one `--overlap-param-gather` waits, in the other `--overlap-grad-reduce` sends."""
    assert ranks.run(hooks, world_size=1) == [["forward", "gradient"]]
