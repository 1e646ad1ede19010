"""The router and the balance of its experts: flags, and what Trinity's router is not."""

from __future__ import annotations

import argparse

from megatron_trinity.arguments.refusal import Refusal
from megatron_trinity.moe.balancing import RULES, SIGN_DEFAULT, SMEBU_DEFAULTS


def add_router_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(title="trinity router")
    group.add_argument(
        "--load-balancing",
        choices=RULES,
        default="sign",
        help="how the expert bias follows the load; the sign rule's step is "
        "--moe-router-bias-update-rate (default: %(default)s)",
    )
    group.add_argument(
        "--smebu-kappa",
        type=float,
        default=SMEBU_DEFAULTS[0],
        help="clamp (default: %(default)s)",
    )
    group.add_argument(
        "--smebu-lambda",
        type=float,
        default=SMEBU_DEFAULTS[1],
        help="largest step (default: %(default)s)",
    )
    group.add_argument(
        "--smebu-beta",
        type=float,
        default=SMEBU_DEFAULTS[2],
        help="momentum (default: %(default)s)",
    )


ROUTER_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "router",
        lambda a: (
            a.moe_router_score_function != "sigmoid"
            or not a.moe_router_enable_expert_bias
            or a.moe_router_load_balancing_type not in ("none", ["none"])
        ),
        "Trinity's router has sigmoid scores, an expert bias and no auxiliary loss of "
        "Megatron's; leave {--moe-router-score-function} and {--moe-router-load-balancing-type} "
        "at their defaults",
    ),
    Refusal(
        "balancing-rates",
        lambda a: (
            a.moe_router_bias_update_rate <= 0
            or a.smebu_kappa <= 0
            or a.smebu_lambda <= 0
            or not 0 <= a.smebu_beta < 1
        ),
        "{--moe-router-bias-update-rate}, {--smebu-kappa} and {--smebu-lambda} must be above 0 "
        "and {--smebu-beta} in [0, 1); use {--load-balancing} none for a bias that does not move",
    ),
    Refusal(
        "balancing-unused",
        lambda a: (
            (a.load_balancing != "sign" and a.moe_router_bias_update_rate != SIGN_DEFAULT)
            or (
                a.load_balancing != "smebu"
                and (a.smebu_kappa, a.smebu_lambda, a.smebu_beta) != SMEBU_DEFAULTS
            )
        ),
        "{--load-balancing=} would ignore a rate that was given: {--moe-router-bias-update-rate} "
        "is of the sign rule, {--smebu-kappa}, {--smebu-lambda} and {--smebu-beta} are of smebu; "
        "leave it out or choose that rule",
    ),
    Refusal(
        "router-extras",
        lambda a: (
            a.moe_expert_capacity_factor is not None
            or a.moe_z_loss_coeff is not None
            or a.moe_router_num_groups
            or a.moe_router_fusion
            or a.moe_enable_routing_replay
        ),
        "Trinity's router drops no tokens and knows no groups, router z-loss, fusion or replay; "
        "leave out {--moe-expert-capacity-factor}, {--moe-z-loss-coeff}, "
        "{--moe-router-num-groups}, {--moe-router-fusion} and {--moe-enable-routing-replay}",
    ),
)
