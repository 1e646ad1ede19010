"""The optimizer: its flags, and what it cannot do."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_trinity.arguments.refusal import Refusal

COEFFICIENT_TYPES = ("quintic", "simple", "polar_express", "aol", "deepseekv4")
"""The sets of emerging-optimizers (which is not imported before arguments are checked) but for
`cans`, which amplifies rounding near a singular value of 1: by 0.3 % of a rank-1 matrix in fp32."""


def _is_muon(args: Namespace) -> bool:
    return bool(args.optimizer == "muon")


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity optimizer")
    group.add_argument(
        "--adamw-lr",
        type=float,
        help="peak learning rate of what AdamW updates under --optimizer muon; --lr is Muon's",
    )
    group.add_argument(
        "--adamw-min-lr",
        type=float,
        default=0.0,
        help="what it decays to; --min-lr is Muon's (default: %(default)s)",
    )
    group.add_argument(
        "--adamw-weight-decay",
        type=float,
        help="of what AdamW updates under --optimizer muon (default: --weight-decay)",
    )
    group.add_argument(
        "--norm-weight-decay",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decay norm gains as well, under --optimizer muon (default: %(default)s)",
    )
    group.add_argument(
        "--router-optimizer",
        choices=("muon", "adamw"),
        default="muon",
        help="what updates the routers under --optimizer muon (default: %(default)s)",
    )


OPTIMIZER_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "optimizer",
        lambda a: a.optimizer not in ("adam", "muon"),
        "{--optimizer=}: use muon or adam, with {--use-distributed-optimizer} to shard the "
        "optimizer's state",
    ),
    Refusal(
        "adam-betas",
        lambda a: not (0 <= a.adam_beta1 < 1 and 0 <= a.adam_beta2 < 1),
        "{--adam-beta1=}, {--adam-beta2=}: use 0 or more, and less than 1",
    ),
    Refusal(
        "optimizer-instances",
        lambda a: a.num_distributed_optimizer_instances > 1 and not a.use_distributed_optimizer,
        "{--num-distributed-optimizer-instances=} are parts of the ranks that shard the "
        "optimizer's state; use {--use-distributed-optimizer} as well",
    ),
    Refusal(
        "param-gather",
        lambda a: (
            a.overlap_param_gather and not (a.use_distributed_optimizer and a.overlap_grad_reduce)
        ),
        "{--overlap-param-gather} gathers the shards of the optimizer under the forward pass; use "
        "{--use-distributed-optimizer} and {--overlap-grad-reduce} as well, or leave it out",
    ),
    Refusal(
        "buckets",
        lambda a: a.ddp_bucket_size is not None and a.ddp_num_buckets is not None,
        "{--ddp-bucket-size=}, {--ddp-num-buckets=}: either says how large a bucket is; leave out "
        "one of them",
    ),
    Refusal(
        "muon-rates",
        lambda a: _is_muon(a) and (a.adamw_lr is None or a.decoupled_lr is not None),
        "{--optimizer} muon has a learning rate of its own for what AdamW updates; give it with "
        "{--adamw-lr} and {--adamw-min-lr}, in place of {--decoupled-lr}",
    ),
    Refusal(
        "muon-rate-order",
        lambda a: _is_muon(a) and not a.lr_warmup_init <= a.adamw_lr >= a.adamw_min_lr >= 0,
        "{--adamw-lr=} is the peak: it cannot be below {--adamw-min-lr=} or {--lr-warmup-init=}, "
        "nor they below 0; change one of them",
    ),
    Refusal(
        "muon-decay-ramp",
        lambda a: _is_muon(a) and a.weight_decay_incr_style != "constant",
        "{--weight-decay-incr-style=}: weight decay is constant under {--optimizer} muon; leave "
        "it out",
    ),
    Refusal(
        "muon-precision",
        lambda a: _is_muon(a) and (a.fp16 or a.fp8_param_gather or a.fp4_param_gather),
        "{--optimizer} muon updates bf16 and fp32 parameters, in rows and pieces that others do "
        "not take; use {--bf16} in place of {--fp16}, and leave out {--fp8-param-gather} and "
        "{--fp4-param-gather}",
    ),
    Refusal(
        "muon-sharding",
        lambda a: _is_muon(a) and (a.use_megatron_fsdp or a.use_torch_fsdp2),
        "{--optimizer} muon needs whole matrices, which FSDP cuts; use "
        "{--use-distributed-optimizer}, which shards by whole matrices, in place of "
        "{--use-megatron-fsdp} or {--use-torch-fsdp2}",
    ),
    Refusal(
        "muon-modes",
        lambda a: (
            _is_muon(a)
            and (
                a.muon_tp_mode != "duplicated"
                or not a.muon_split_qkv
                or a.muon_scale_mode != "shape_scaling"
                or a.muon_scalar_optimizer != "adam"
                or a.muon_extra_scale_factor != 1.0
            )
        ),
        "Trinity's Muon does not depend on the layout, splits fused matrices and scales the "
        "learning rate by sqrt(max(1, fan_out/fan_in)); leave out {--muon-tp-mode}, "
        "{--muon-no-split-qkv}, {--muon-scale-mode}, {--muon-scalar-optimizer} and "
        "{--muon-extra-scale-factor}",
    ),
    Refusal(
        "muon-newton-schulz",
        lambda a: (
            _is_muon(a)
            and (
                a.muon_coefficient_type not in COEFFICIENT_TYPES
                or a.muon_num_ns_steps < 1
                or a.muon_fp32_matmul_prec not in ("medium", "high")
                or not 0 <= a.muon_momentum < 1
            )
        ),
        "{--muon-coefficient-type=}, {--muon-num-ns-steps=}, {--muon-fp32-matmul-prec=}, "
        "{--muon-momentum=}: use one of quintic, simple, polar_express, aol, deepseekv4; 1 step "
        "or more; medium (bf16) or high (fp32); and a momentum in [0, 1)",
    ),
    Refusal(
        "muon-overlap",
        lambda a: (
            _is_muon(a)
            and (
                a.overlap_param_gather_with_optimizer_step
                or a.optimizer_cpu_offload
                or a.optimizer_cuda_graph
                or a.use_precision_aware_optimizer
            )
        ),
        "{--optimizer} muon gathers weights behind its step or under the next forward pass, and "
        "keeps its state in fp32 on the device; leave out "
        "{--overlap-param-gather-with-optimizer-step}, {--optimizer-cpu-offload}, "
        "{--optimizer-cuda-graph} and {--use-precision-aware-optimizer}; {--overlap-param-gather} "
        "is for the forward pass",
    ),
    Refusal(
        "muon-checkpoint",
        lambda a: _is_muon(a) and a.load_main_params_from_ckpt,
        "{--load-main-params-from-ckpt} is for checkpoints without fp32 weights, and "
        "{--optimizer} muon saves its own; leave it out",
    ),
    Refusal(
        "muon-rank-files",
        lambda a: _is_muon(a) and a.ckpt_format == "torch" and a.use_distributed_optimizer,
        "{--ckpt-format} torch has the state of one data-parallel rank, and {--optimizer} muon "
        "with {--use-distributed-optimizer} has it on all; use {--ckpt-format} torch_dist",
    ),
)
