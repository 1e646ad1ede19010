"""The command line: Megatron's flags, Trinity's on top, and presets.

What wins, from weakest to strongest: Megatron's defaults, what makes a model a Trinity model, what
the machine has (CUDA, and the packages with kernels for it), the preset, the command line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NoReturn

import torch

from megatron_trinity.arguments.checkpoints import add_checkpoint_arguments
from megatron_trinity.arguments.cuda import CUDA_ONLY, refuse_cuda_only_arguments, set_cpu_defaults
from megatron_trinity.arguments.data import add_data_arguments, derive_data
from megatron_trinity.arguments.faults import add_fault_arguments
from megatron_trinity.arguments.installed import (
    gpu_argument_defaults,
    refuse_what_is_not_installed,
)
from megatron_trinity.arguments.kernels import add_kernel_arguments, derive_kernels
from megatron_trinity.arguments.loss import add_loss_arguments
from megatron_trinity.arguments.machine import prepare_machine
from megatron_trinity.arguments.model import add_model_arguments, derive_model
from megatron_trinity.arguments.monitoring import add_monitoring_arguments
from megatron_trinity.arguments.numbers import LEAST_REFUSALS
from megatron_trinity.arguments.optimizer import add_optimizer_arguments
from megatron_trinity.arguments.precision import (
    add_precision_arguments,
    derive_precision,
    refuse_precision_of_machine,
    tune_precision,
)
from megatron_trinity.arguments.presets import add_preset_argument, apply_preset, explain_negation
from megatron_trinity.arguments.refusal import refuse
from megatron_trinity.arguments.refusals import validate
from megatron_trinity.arguments.router import add_router_arguments
from megatron_trinity.arguments.schedule import add_schedule_arguments, derive_schedule
from megatron_trinity.arguments.verdicts.table import off_standard, refuse_flags, standard_values
from megatron_trinity.arguments.written import Blocks, as_preset
from megatron_trinity.errors import UsageError
from megatron_trinity.moe.balancing import SIGN_DEFAULT
from megatron_trinity.upstream.installed import find_installed

EXAMPLE = """example:
  torchrun --nproc-per-node 2 pretrain_trinity.py --preset tiny --expert-model-parallel-size 2 \\
    --tokenizer-model runs/quickstart/tokenizer --train-data-path runs/quickstart/data_train \\
    --valid-data-path runs/quickstart/data_valid --train-iters 200
"""

SUBJECTS = (
    add_preset_argument,
    add_model_arguments,
    add_router_arguments,
    add_loss_arguments,
    add_schedule_arguments,
    add_optimizer_arguments,
    add_data_arguments,
    add_checkpoint_arguments,
    add_monitoring_arguments,
    add_fault_arguments,
    add_kernel_arguments,
    add_precision_arguments,
)
"""What adds Trinity's own flags, in the order of `--help`."""

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
    # None until `derive_model` sets them from Trinity's flags.
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
    from megatron.training.arguments import validate_args

    from megatron_trinity.upstream.assertions import refusing

    args, parsing = _parse(argv)
    given = off_standard(args, parsing.standard)
    refuse(args, LEAST_REFUSALS)
    derive_data(args)
    derive_model(args)
    derive_kernels(args)
    derive_precision(args)
    derive_schedule(args)
    if torch.cuda.is_available():
        refuse_what_is_not_installed(args, find_installed())
    else:
        refuse_cuda_only_arguments(args)
    validate(args)
    refuse_flags(given, torch.cuda.is_available(), {rule.flag for rule in CUDA_ONLY})
    tune_precision(args)
    prepare_machine(args)
    if torch.cuda.is_available() and args.precision is not None:
        refuse_precision_of_machine(args, torch.cuda.get_device_capability(), torch.version.cuda)
    with refusing("the arguments do not fit together"):
        validate_args(args)
    return args


def written_arguments(argv: Sequence[str] | None = None) -> Blocks:
    """What the command line says with its preset and all defaults, as the blocks of a preset.

    Raises:
        UsageError: no preset can say it.
    """
    args, parsing = _parse(argv)
    assert parsing.parser is not None
    return as_preset(parsing.parser, args, parsing.defaults, parsing.trinity_flags)


@dataclass
class _Parsing:
    """What is known of a parser once it is complete.

    Attributes:
        parser: with the preset's values as its defaults.
        defaults: argument to value, without the preset.
        standard: flag to its argument and what leaves it alone.
        trinity_flags: those that are not Megatron's.
    """

    parser: argparse.ArgumentParser | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    standard: dict[str, tuple[str, Any]] = field(default_factory=dict)
    trinity_flags: set[str] = field(default_factory=set)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, _Parsing]:
    from megatron.training.arguments import parse_args

    parsing = _Parsing()
    saved = sys.argv
    sys.argv = [saved[0], *(saved[1:] if argv is None else argv)]
    try:
        args = parse_args(extra_args_provider=partial(_complete_parser, parsing))
    finally:
        sys.argv = saved
    return args, parsing


def standard_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's parser with Trinity's flags and defaults, for this machine, without a preset."""
    for add in SUBJECTS:
        add(parser)
    _mend_help(parser)
    _mend_choices(parser)
    _check_destinations(parser)
    parser.set_defaults(**TRINITY_DEFAULTS)
    if torch.cuda.is_available():
        parser.set_defaults(**gpu_argument_defaults(find_installed()))
    else:
        set_cpu_defaults(parser)
    return parser


def _complete_parser(parsing: _Parsing, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what is Trinity's; `parsing` is told what is known before the preset."""
    megatron_flags = set(parser._option_string_actions)
    parsing.parser = standard_parser(parser)
    parsing.trinity_flags = set(parser._option_string_actions) - megatron_flags
    parsing.standard = standard_values(parser)
    parsing.defaults = {action.dest: parser.get_default(action.dest) for action in parser._actions}
    parser.description = "Train a Trinity model with Megatron-Core."
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: _usage_error(explain_negation(parser, message))  # type: ignore[method-assign]
    preset = _chosen_preset()
    if preset is not None:
        apply_preset(parser, preset, parsing.trinity_flags)
    return parser


def _mend_help(parser: argparse.ArgumentParser) -> None:
    # One of Megatron's help texts has a bare per cent sign, and argparse would fail on it.
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%%|%(?!\()", "%%", action.help)


def _mend_choices(parser: argparse.ArgumentParser) -> None:
    # Megatron looks a name up in an enumeration, and argparse knows nothing of a KeyError.
    for action in parser._actions:
        choices = list(action.choices or ())
        if choices and isinstance(choices[0], Enum) and callable(action.type):
            action.type = partial(_chosen, action.type, [choice.name for choice in choices])


def _chosen(look_up: Callable[[str], Any], names: Sequence[str], text: str) -> Any:
    try:
        return look_up(text)
    except KeyError as error:
        wrong = f"{text!r} is none of {', '.join(names)}"
        raise argparse.ArgumentTypeError(wrong) from error


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
