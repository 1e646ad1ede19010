"""The optimizer of a Trinity model: Muon and AdamW as one, over all of Megatron's parallelism.

A step: global gradient norm and clipping, Muon on the matrices that are this rank's work, AdamW on
what it keeps, weights to all data-parallel ranks. Gradients come summed over those, in Megatron's
buffers. With `--use-distributed-optimizer` a rank has the sums of its shards alone, and
keeps the state of those (`shards`); without it every rank keeps all, and each matrix is still
orthogonalised once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_trinity.optimizer.exchange import Name, broadcast_from_owners
from megatron_trinity.optimizer.muon import MOMENTUM, Held, Muon, MuonConfig
from megatron_trinity.optimizer.newton_schulz import coefficients
from megatron_trinity.optimizer.owners import find_owners
from megatron_trinity.optimizer.param_groups import Group
from megatron_trinity.optimizer.ranks import data_parallel, held_by_ranks, matrix_group
from megatron_trinity.optimizer.shards import Shards
from megatron_trinity.optimizer.units import MASTER, Unit, gradient_of, units_in_shards, units_of

MOMENTS = {"muon": (MOMENTUM,), "adamw": ("exp_avg", "exp_avg_sq")}
KINDS_OF_RANKS = (False, True)  # experts or not


class TrinityOptimizer(MegatronOptimizer):
    """Muon for hidden matrices and AdamW for the rest.

    Its learning rates are set by Megatron's scheduler, through `param_groups`: one dictionary a
    group, with its `name` and `kind`.
    """

    is_stub_optimizer = False

    def __init__(
        self, config: OptimizerConfig, model: Sequence[Any], groups: Sequence[Group]
    ) -> None:
        """Args: model: the chunks of this rank, in Megatron's `DistributedDataParallel` where state
        is shared; groups: see `param_groups`.

        Raises:
            TrinityError: a parameter is in no group or in two.
        """
        chunks: list[MegatronModule] = unwrap_model(list(model))
        is_shared = config.use_layer_wise_distributed_optimizer
        self._shards = Shards(model) if is_shared else None
        self._ranks = {experts: data_parallel(experts, is_shared) for experts in KINDS_OF_RANKS}
        self._model_parameters = [p for chunk in chunks for p in chunk.parameters()]
        if self._shards:
            self._units = units_in_shards(chunks, groups, self._shards.places)
        else:
            self._units = units_of(chunks, groups)
            find_owners(self._units, self._ranks)
        self._kept = [unit for unit in self._units if not self._shards or self._owns(unit)]
        for unit in self._kept:
            moments = MOMENTS[unit.group.kind]
            if self._shards:
                self._shards.keep(unit, moments)
            else:
                unit.keep(*moments)
        self._muon = self._planned_muon(muon_config(config))
        self._steps = 0  # that were applied
        self._squares: Sequence[float] | None = None
        adamw = self._adamw(config, groups)
        super().__init__(adamw, config)
        muon = [_param_group(group) for group in groups if group.kind == "muon"]
        self._groups = [*muon, *adamw.param_groups]
        self._one = torch.ones(1, device=torch.cuda.current_device())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """A dictionary for each group; the scheduler sets `lr` and `weight_decay`."""
        return self._groups

    @property
    def units(self) -> Sequence[Unit]:
        """Everything that this rank's model chunks consist of, kept here or elsewhere."""
        return self._units

    def work(self) -> list[tuple[Name, tuple[int, int]]]:
        """The matrices that this rank orthogonalises in a step, with their shapes."""
        return self._muon.work()

    def get_parameters(self) -> list[nn.Parameter]:
        """The model's parameters on this rank."""
        return list(self._model_parameters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: gradients are in Megatron's buffers, and the model zeroes those."""

    def get_loss_scale(self) -> Tensor:
        """1: bf16 and fp32 need no scale."""
        return self._one

    def prepare_grads(self) -> bool:
        """Nothing to do; Megatron looks for NaN where it sums the gradients."""
        return False

    @torch.no_grad()
    def step(self) -> tuple[bool, float, float | None]:
        """Clip, update, share. Returns whether it was applied, the gradient norm before clipping,
        and the number of zeros in the gradients if it is logged.

        A norm that is not finite changes nothing. Of finite gradients and finite momenta, all that
        is computed is finite.
        """
        with self._timer("optimizer-clip-main-grad"):
            norm = self.get_grad_norm()
            if not math.isfinite(norm):
                return False, norm, None
            self._clip(norm)
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        if norm > self.config.grad_norm_skip_threshold:
            return False, norm, zeros
        return self.step_with_ready_grads(), norm, zeros

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update every weight from gradients that need nothing more."""
        with self._timer("optimizer-inner-step"):
            self._muon.accumulate(*self._momenta_and_gradients())
            self._muon.update({g["name"]: (g["lr"], g["weight_decay"]) for g in self._groups})
            self._step_adamw()
            self._steps += 1
        with self._timer("optimizer-copy-main-to-model-params"):
            self._share()
        return True

    def get_grad_norm(self) -> float:
        """Of all parameters of the model, each counted once; the same in every layout."""
        squares, self._squares = self._squares, None
        if squares is None:
            squares = self.gradient_squares().tolist()
        return math.hypot(*(square**0.5 for square in squares))

    @torch.no_grad()
    def gradient_squares(self) -> Tensor:
        """What the norm is made of, `[k]` fp32 on the device; collective."""
        return torch.cat([squared_norm(*counted) for counted in self._counted_gradients()])

    def squares_read(self, squares: Sequence[float] | None) -> None:
        """Take them for the next norm, so that the host need not wait for it; None for nothing."""
        self._squares = squares

    def count_zeros(self) -> float:
        """Number of zeros in the gradients of the whole model."""
        total = 0.0
        for gradients, group in self._counted_gradients():
            zeros = torch.zeros(1, device=torch.cuda.current_device())
            for gradient in gradients:
                zeros += gradient.numel() - torch.count_nonzero(gradient)
            dist.all_reduce(zeros, group=group)
            total += float(zeros)
        return total

    @torch.no_grad()
    def reload_model_params(self, state_dict: Any = None) -> None:
        """Take the model's weights as the fp32 ones, for example after loading them alone."""
        for unit in self._kept:
            unit.master.copy_(unit.weights)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: number of steps, and what this rank keeps, by unit."""
        state = {
            unit.name: {
                name: {
                    str(number): unit.rows_of(part, tensor)
                    for number, part in enumerate(unit.parts)
                }
                for name, tensor in unit.state.items()
            }
            for unit in self._kept
        }
        return {"step": self._steps, "state": state}

    def sharded_state_dict(
        self,
        model_sharded_state_dict: Any,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What `dist_checkpointing` saves, or loads into, by unit.

        Keys are `optimizer.state.NAME.` and the canonical name of a parameter, with NAME one of
        `fp32_param`, `momentum_buffer`, `exp_avg`, `exp_avg_sq`; in every layout and precision.
        """
        state: dict[str, Any] = {}
        for unit in self._kept:
            ranks = self._ranks[unit.experts]
            replica = ranks.instance if self._shards else ranks.rank
            tensors = dict(unit.state)
            if is_loading:  # the model's own weights, which these may be, are loaded meanwhile
                tensors[MASTER] = torch.empty_like(unit.master)
            state[unit.name] = {
                name: unit.sharded(name, tensor, replica) for name, tensor in tensors.items()
            }
        return {"step": self._steps, "state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what was loaded into the tensors of `sharded_state_dict`, or a `state_dict`."""
        self._steps = int(state_dict["step"])
        for unit in self._kept:
            for name, parts in state_dict["state"][unit.name].items():
                for number, tensor in parts.items():
                    rows = unit.rows_of(unit.parts[int(number)], unit.state[name])
                    rows.copy_(tensor.view(rows.shape))
        for state in self.optimizer.state.values():
            state["step"].fill_(self._steps)
        self._share(now=True)

    def _of(self, kind: str) -> list[Unit]:
        return [unit for unit in self._kept if unit.group.kind == kind]

    def _owns(self, unit: Unit) -> bool:
        return unit.owner == self._ranks[unit.experts].rank

    def _adamw(self, config: OptimizerConfig, groups: Sequence[Group]) -> torch.optim.AdamW:
        units = self._of("adamw")
        optimizer = torch.optim.AdamW(
            [
                {
                    **_param_group(group),
                    "params": [unit.master for unit in units if unit.group == group],
                }
                for group in groups
                if group.kind == "adamw"
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True,
        )
        for unit in units:
            # From the start, so that a checkpoint has them before the first step.
            step = torch.zeros((), device=unit.master.device)
            moments = {name: unit.state[name] for name in MOMENTS["adamw"]}
            optimizer.state[unit.master] = {"step": step, **moments}
        return optimizer

    def _step_adamw(self) -> None:
        units = self._of("adamw")
        for unit in units:
            unit.master.grad = unit.gradient.float()
        self.optimizer.step()
        for unit in units:
            unit.master.grad = None

    def _planned_muon(self, config: MuonConfig) -> Muon:
        kept = [unit for unit in self._kept if unit.pieces and self._owns(unit)]
        if not self._shards:
            muon = Muon(config, {experts: dp.tensor for experts, dp in self._ranks.items()})
            muon.plan(kept)
            return muon
        groups = {experts: matrix_group(ranks) for experts, ranks in self._ranks.items()}
        held = {}
        for experts, ranks in self._ranks.items():
            by_rank: list[list[Held]] = [[] for _ in range(ranks.size)]
            for unit in self._units:
                if unit.experts == experts:
                    by_rank[unit.owner] += [(unit.group.name, piece) for piece in unit.pieces]
            held[experts] = held_by_ranks(ranks, by_rank, groups[experts])
        muon = Muon(config, groups)
        muon.plan(kept, held)
        return muon

    def _momenta_and_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        if self._shards and self._shards.are_summed:
            muon = [shard for shard in self._shards.all if MOMENTUM in shard.state]
            return [shard.state[MOMENTUM] for shard in muon], [shard.gradients for shard in muon]
        units = self._of("muon")
        return [unit.state[MOMENTUM] for unit in units], [unit.gradient for unit in units]

    def _clip(self, norm: float) -> None:
        limit = self.config.clip_grad
        factor = limit / (norm + 1e-6)
        if limit > 0.0 and factor < 1.0 and self._kept:
            if self._shards and self._shards.are_summed:
                gradients = [shard.gradients for shard in self._shards.all]
            else:
                gradients = [unit.gradient for unit in self._kept]
            torch._foreach_mul_(gradients, factor)

    def _counted_gradients(self) -> list[tuple[list[Tensor], dist.ProcessGroup]]:
        """Those that this rank has and counts, and the ranks that count the others."""
        dense, experts = (self._ranks[kind].tensor for kind in KINDS_OF_RANKS)

        def counts(parameter: nn.Parameter) -> bool:
            return bool(
                parameter.requires_grad
                and param_is_not_shared(parameter)
                and param_is_not_tensor_parallel_duplicate(parameter, dense, experts)
            )

        if self._shards:  # what an instance has is all there is, once
            gradients = [unit.gradient for unit in self._kept if counts(unit.parameter)]
            return [(gradients, parallel_state.get_intra_distributed_optimizer_instance_group())]
        by_kind: dict[bool, list[Tensor]] = {False: [], True: []}
        for parameter in filter(counts, self._model_parameters):
            is_expert = not getattr(parameter, "allreduce", True)
            by_kind[is_expert].append(gradient_of(parameter))
        return [
            (by_kind[False], parallel_state.get_model_parallel_group()),
            (by_kind[True], parallel_state.get_expert_tensor_model_pipeline_parallel_group()),
        ]

    def _share(self, now: bool = False) -> None:
        """Bring the new weights into the model, on every data-parallel rank.

        Args: now: not only when the next forward pass asks for them.
        """
        if self._shards:
            self._shards.to_model()
            self._shards.gather(now)
            return
        self._broadcast_masters()
        self._copy_to_model()

    def _broadcast_masters(self) -> None:
        for experts, ranks in self._ranks.items():
            by_owner: list[list[Tensor]] = [[] for _ in range(ranks.size)]
            for unit in self._of("muon"):
                if unit.experts == experts:
                    by_owner[unit.owner].append(unit.master)
            broadcast_from_owners(by_owner, ranks.group)

    def _copy_to_model(self) -> None:
        units = [unit for unit in self._kept if unit.parameter.dtype != torch.float32]
        if units:
            torch._foreach_copy_([unit.weights for unit in units], [unit.master for unit in units])

    @contextmanager
    def _timer(self, name: str) -> Iterator[None]:
        timers = self.config.timers
        if timers is not None:
            timers(name, log_level=1).start(barrier=self.config.barrier_with_L1_time)
        yield
        if timers is not None:
            timers(name).stop()


def squared_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Over the ranks of `group`, `[1]` fp32 on the device: Megatron's `get_grad_norm_fp32`."""
    total = torch.zeros(1, device=torch.cuda.current_device())
    if gradients:
        overflow = torch.zeros(1, dtype=torch.int, device=total.device)
        norm, _ = clip_grads.multi_tensor_applier(
            clip_grads.l2_norm_impl, overflow, [list(gradients)], False
        )
        total = norm**2.0
    dist.all_reduce(total, group=group)
    return total


def muon_config(config: OptimizerConfig) -> MuonConfig:
    """Muon's part of Megatron's configuration."""
    return MuonConfig(
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        steps=coefficients(config.muon_coefficient_type, config.muon_num_ns_steps),
        dtype=torch.bfloat16 if config.muon_fp32_matmul_prec == "medium" else torch.float32,
    )


def _param_group(group: Group) -> dict[str, Any]:
    """In the form that Megatron's scheduler and log know."""
    return {
        "name": group.name,
        "kind": group.kind,
        "max_lr": group.max_lr,
        "min_lr": group.min_lr,
        "start_wd": group.weight_decay,
        "end_wd": group.weight_decay,
        "lr": 0.0,
        "weight_decay": group.weight_decay,
        "default_config": group.kind == "muon",  # whose rate is the log's "learning rate"
    }
