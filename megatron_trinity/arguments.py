"""The command line: Megatron's flags, Trinity's on top, and presets.

What wins, from weakest to strongest: Megatron's defaults, what makes a model a Trinity model, what
a machine without CUDA needs, the preset, the command line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from megatron_trinity.checkpoint.arguments import add_checkpoint_arguments
from megatron_trinity.errors import UsageError
from megatron_trinity.model.architecture import initializer_sigma, moe_pattern, no_rope_pattern
from megatron_trinity.moe.balancing import RULES, SIGN_DEFAULT, SMEBU_DEFAULTS
from megatron_trinity.optimizer.arguments import add_optimizer_arguments, derive_schedule
from megatron_trinity.presets import apply_preset, preset_names
from megatron_trinity.upstream import refuse_cuda_only_arguments, set_cpu_defaults
from megatron_trinity.validation import validate

EXAMPLE = """example:
  torchrun --nproc-per-node 2 pretrain_trinity.py --preset tiny --expert-model-parallel-size 2 \\
    --tokenizer-model runs/quickstart/tokenizer --train-data-path runs/quickstart/data_train \\
    --valid-data-path runs/quickstart/data_valid --train-iters 200
"""

TRINITY_DEFAULTS = {
    # What every Trinity model has, whatever its size (report, section 2).
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "attention_output_gate": True,
    "group_query_attention": True,
    "hidden_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "moe_router_bias_update_rate": SIGN_DEFAULT,
    "moe_router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
    "moe_router_score_function": "sigmoid",
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_layernorm": True,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    # None until `derive_megatron_arguments` sets them from Trinity's flags.
    "init_method_std": None,
    "moe_layer_freq": None,
    # What suits it among Megatron's choices.
    "async_strategy": "mcore",
    "cp_comm_type": ["all_gather"],
    "calculate_per_token_loss": True,  # a mean over tokens does not depend on the micro-batch
    "create_attention_mask_in_dataloader": False,
    "enable_one_logger": False,  # a service that is not public
    "eval_interval": 1000,
    "dist_ckpt_optim_fully_reshardable": True,  # a checkpoint does not depend on the layout
    "log_memory_to_tensorboard": True,
    "log_timers_to_tensorboard": True,
    "moe_token_dispatcher_type": "alltoall",
    "muon_momentum": 0.95,
    "muon_scale_mode": "shape_scaling",  # report, eq. 41
    "muon_tp_mode": "duplicated",
    "tokenizer_type": "HuggingFaceTokenizer",
    "transformer_impl": "local",
    "use_persistent_ckpt_worker": True,  # of --async-save, which Megatron turns off without it
}
"""Defaults that replace Megatron's: argparse destination to value."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, complete and check the command line.

    Args:
        argv: the words behind the program's name; by default the process's own.

    Raises:
        UsageError: anything in it that cannot work, in one line.
    """
    from megatron.training.arguments import parse_args, validate_args

    from megatron_trinity.upstream.assertions import refusing

    saved = sys.argv
    sys.argv = [saved[0], *(saved[1:] if argv is None else argv)]
    try:
        args = parse_args(extra_args_provider=_complete_parser)
    finally:
        sys.argv = saved
    _refuse_overridden(args)
    derive_megatron_arguments(args)
    if not torch.cuda.is_available():
        refuse_cuda_only_arguments(args)
    validate(args)
    with refusing("the arguments do not fit together"):
        validate_args(args)
    return args


def add_trinity_arguments(parser: argparse.ArgumentParser) -> set[str]:
    """Add Trinity's own flags to `parser`; returns their option strings."""
    group = parser.add_argument_group(title="trinity")
    actions = [
        group.add_argument(
            "--preset", metavar="NAME", help=f"{', '.join(preset_names())}, or a YAML file"
        ),
        group.add_argument(
            "--sliding-window",
            type=int,
            metavar="W",
            help="keys that a query of a local layer sees, itself included",
        ),
        group.add_argument(
            "--global-attn-every-n-layers",
            type=int,
            default=4,
            metavar="N",
            help="every N-th layer is global: full attention, no RoPE (default: %(default)s)",
        ),
        group.add_argument(
            "--num-dense-layers",
            type=int,
            default=0,
            metavar="K",
            help="layers at the start with a dense MLP in place of experts (default: %(default)s)",
        ),
        group.add_argument(
            "--num-shared-experts",
            type=int,
            default=1,
            metavar="S",
            help="experts that see every token (default: %(default)s)",
        ),
        group.add_argument(
            "--mup-enabled",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="multiply token embeddings by sqrt(hidden size) (default: %(default)s)",
        ),
        group.add_argument(
            "--load-balancing",
            choices=RULES,
            default="sign",
            help="how the expert bias follows the load; the sign rule's step is "
            "--moe-router-bias-update-rate (default: %(default)s)",
        ),
        group.add_argument(
            "--smebu-kappa",
            type=float,
            default=SMEBU_DEFAULTS[0],
            help="clamp (default: %(default)s)",
        ),
        group.add_argument(
            "--smebu-lambda",
            type=float,
            default=SMEBU_DEFAULTS[1],
            help="largest step (default: %(default)s)",
        ),
        group.add_argument(
            "--smebu-beta",
            type=float,
            default=SMEBU_DEFAULTS[2],
            help="momentum (default: %(default)s)",
        ),
        group.add_argument(
            "--seq-aux-loss-coeff",
            type=float,
            default=0.0,
            metavar="ALPHA",
            help="sequence-wise auxiliary loss (default: %(default)s)",
        ),
        group.add_argument(
            "--z-loss-coeff",
            type=float,
            default=0.0,
            help="weight of the mean squared logsumexp of the LM head (default: %(default)s)",
        ),
        group.add_argument(
            "--z-loss-start-iteration",
            type=int,
            default=0,
            metavar="N",
            help="iteration, as in the log, from which the z-loss is on (default: %(default)s)",
        ),
        group.add_argument(
            "--alarm-window",
            type=int,
            default=100,
            metavar="STEPS",
            help="warn when an imbalance or a logit keeps climbing this long (default: "
            "%(default)s)",
        ),
    ]
    return {option for action in actions for option in action.option_strings}


def derive_megatron_arguments(args: argparse.Namespace) -> None:
    """Set, in place, the Megatron arguments that follow from Trinity's."""
    every = args.global_attn_every_n_layers
    if args.num_layers is not None and every > 0:
        args.no_rope_freq = no_rope_pattern(args.num_layers, every)
        args.moe_layer_freq = moe_pattern(args.num_layers, args.num_dense_layers)
        args.window_attn_skip_freq = every
    if args.sliding_window is not None:
        args.window_size = (args.sliding_window - 1, 0)  # Megatron counts the keys to the left.
    if args.num_shared_experts and args.moe_ffn_hidden_size:
        args.moe_shared_expert_intermediate_size = (
            args.num_shared_experts * args.moe_ffn_hidden_size
        )
    if args.init_method_std is None and args.hidden_size is not None:
        args.init_method_std = initializer_sigma(args.hidden_size)
    args.weight_init_seed = args.seed
    derive_schedule(args)


def _complete_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    trinity_flags = set().union(
        add_trinity_arguments(parser),
        add_optimizer_arguments(parser),
        add_checkpoint_arguments(parser),
    )
    parser.description = "Train a Trinity model with Megatron-Core."
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = _usage_error  # type: ignore[method-assign]
    _mend_help(parser)
    _check_destinations(parser)
    parser.set_defaults(**TRINITY_DEFAULTS)
    if not torch.cuda.is_available():
        set_cpu_defaults(parser)
    preset = _chosen_preset()
    if preset is not None:
        apply_preset(parser, preset, trinity_flags)
    return parser


def _mend_help(parser: argparse.ArgumentParser) -> None:
    # One of Megatron's help texts has a bare per cent sign, and argparse would fail on it.
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help)


def _usage_error(message: str) -> NoReturn:
    raise UsageError(f"{message}; --help lists every flag")


def _check_destinations(parser: argparse.ArgumentParser) -> None:
    known = {action.dest for action in parser._actions}
    missing = sorted(set(TRINITY_DEFAULTS) - known)
    if missing:
        raise UsageError(f"megatron-core has no argument {missing[0]} any more")


def _chosen_preset() -> str | None:
    """`--preset` alone, read ahead of the rest, since it changes the defaults of the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.error = _usage_error  # type: ignore[method-assign]
    preset: str | None = parser.parse_known_args()[0].preset
    return preset


def _refuse_overridden(args: argparse.Namespace) -> None:
    """Refuse Megatron flags whose place a Trinity flag takes: none is overridden in silence."""
    replaced = {
        "window_size": "--sliding-window",
        "window_attn_skip_freq": "--global-attn-every-n-layers",
        "no_rope_freq": "--global-attn-every-n-layers",
        "moe_layer_freq": "--num-dense-layers",
        "moe_shared_expert_intermediate_size": "--num-shared-experts",
    }
    for dest, instead in replaced.items():
        if getattr(args, dest) is not None:
            flag = "--" + dest.replace("_", "-")
            raise UsageError(f"{flag} follows from a Trinity flag; use {instead}")
