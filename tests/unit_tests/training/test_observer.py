"""The line beneath Megatron's, and what is said of balance at the start."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_trinity.errors import TrinityError
from tests.distributed.pool import RankPools
from tests.trinity import afmoe_config, build, parse


def test_a_line_has_the_mean_of_each_value_over_the_steps_that_have_it() -> None:
    from megatron_trinity.training.observer import balance_line

    steps = [{"max logit": 1.0, "mean logit": -2.0}, {"mean logit": -4.0}]
    line = balance_line(20, steps)
    assert line == " balance         20 | max logit: 1 | mean logit: -3 |"
    assert balance_line(1, [{}]) == " balance          1 |  |"
    line = balance_line(7, [{"max logit": 1.0}, {"max logit": 3.0}], {"adamw learning rate": 2e-4})
    assert line == " balance          7 | max logit: 2 | adamw learning rate: 0.0002 |"


def test_the_rates_that_megatron_does_not_log() -> None:
    from megatron_trinity.training.observer import other_rates

    groups = [
        {"kind": "muon", "lr": 1e-3, "default_config": True},
        {"kind": "adamw", "lr": 3e-4, "default_config": False},
        {"kind": "adamw", "lr": 3e-4, "default_config": False},
    ]
    assert other_rates(groups) == {"adamw learning rate": 3e-4}
    assert other_rates([{"lr": 1e-3, "default_config": True}]) == {}  # Megatron's own optimizers


def announced(rank: int, world_size: int, rule: str, missing: int) -> str:
    import contextlib
    import io

    from megatron_trinity.training.balance import announce_balance

    args = parse(afmoe_config(), ["--load-balancing", rule, "--verbose-log"])
    model = build(args)
    promised = Namespace(**{**vars(args), "moe_layer_freq": [*args.moe_layer_freq, *[1] * missing]})
    with contextlib.redirect_stdout(io.StringIO()) as out:
        announce_balance(promised, [model])
    return out.getvalue().strip()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("sign", "> experts of 4 MoE layers: by the sign rule, step 0.001"),
        ("smebu", "> experts of 4 MoE layers: by SMEBU, kappa 2, lambda 0.0005, beta 0.5"),
        (
            "none",
            "> experts of 4 MoE layers: not balanced: their expert bias stays as it is",
        ),
    ],
)
def test_the_number_of_balanced_layers_is_said(ranks: RankPools, rule: str, said: str) -> None:
    assert ranks.run(announced, rule, 0, world_size=1) == [said]


def missing_router(rank: int, world_size: int) -> str:
    try:
        return announced(rank, world_size, "sign", 1)
    except TrinityError as error:
        return f"error: {error}"


def test_a_layer_that_nothing_balances_is_an_error(ranks: RankPools) -> None:
    [result] = ranks.run(missing_router, world_size=1)
    assert result.startswith("error: 4 of 5 MoE layers")
