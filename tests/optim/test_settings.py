"""Settings: a direction under a name that the fused backends know, with other numbers, is refused by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import pytest
import torch
from torch import Tensor

from support.cases import cases
from support.runs import optimizer
from support.table import CONSTRAINTS, EVERY_OPTIMIZER, ConstraintRow, OptimizerRow, constrained_parameter
from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.direction import Direction, Moment, Moments, Options, State
from symopt_kernels.native.binding import step as native_step
from symopt_kernels.settings import SETTINGS
from symopt_kernels.triton.launch import step as triton_step


def misnamed(name: str, settings: dict[str, float]) -> type[ConstrainedOptimizer]:
    """An optimizer whose direction says that it is ``name``, and gives these settings."""

    class Misnamed(Direction):
        table = (Moment("exp_avg", "first"), Moment("exp_avg_sq", "second", per_unit=True))
        counts_steps = name.startswith("adam")

        def row(self, options: Options) -> str:
            return name

        def settings(self, options: Options) -> dict[str, float | bool]:
            return settings

        def lead(self, options: Options, state: State, grad: Tensor) -> tuple[Tensor, Moments]:
            return grad, {}

    @final
    class Foreign(ConstrainedOptimizer):
        direction = final(Misnamed)()

        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {"lr": 0.01}, **options)

        def _step_plain(self, group: dict[str, Any]) -> None:
            raise NotImplementedError

    return Foreign


OTHER_SETTINGS: list[tuple[dict[str, float], str]] = [
    ({"centred": 0.9}, "centred"),
    ({"centred": 0.9, "lookahead": 0.5}, "centred, lookahead"),
]


def spoilt(name: str) -> list[tuple[dict[str, float], str, list[str]]]:
    """Settings that are not those of a direction, with what is unknown and what is missing."""
    all_of_it = dict.fromkeys(SETTINGS[name], 0.5)
    others = [(all_of_it | more, f", not {named}", list[str]()) for more, named in OTHER_SETTINGS]
    lacking = [({k: v for k, v in all_of_it.items() if k != gone}, "", [gone]) for gone in all_of_it]
    return [*others, *lacking, ({}, "", list(all_of_it)), ({"centred": 0.9}, ", not centred", list(all_of_it))]


@cases(
    name=sorted(SETTINGS),
    row=[row for row in CONSTRAINTS if row.id in ("sparse", "sparse-1d")],
    backend=["native", None],
)
def test_settings_of_another_direction_are_refused_by_name(name: str, row: ConstraintRow, backend: str | None) -> None:
    """A kernel would step with numbers of its own, and say nothing."""
    for settings, unknown, missing in spoilt(name):
        module = constrained_parameter(row)
        before = module.weight.detach().clone()
        opt = misnamed(name, settings)(module, backend=backend)
        module.weight.grad = torch.ones_like(module.weight)
        with pytest.raises(TypeError, match=f"native: the direction '{name}' takes the settings") as error:
            opt.step()
        listed = f"takes the settings {', '.join(SETTINGS[name])}{unknown}"
        assert listed in str(error.value)
        assert not missing or f"and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" in str(
            error.value
        )
        assert torch.equal(module.weight, before)


@cases(name=sorted(SETTINGS), step=[native_step, triton_step])
def test_every_fused_step_takes_exactly_the_settings_of_its_direction(name: str, step: Callable[..., None]) -> None:
    for settings, unknown, missing in spoilt(name):
        with pytest.raises(TypeError, match=f"the direction '{name}' takes") as error:
            step([], name, lr=0.01, **settings)
        assert all(word in str(error.value) for word in (unknown, *missing))


@cases(opt_row=[row for row in EVERY_OPTIMIZER if row.fused])
def test_the_library_gives_every_direction_its_settings(opt_row: OptimizerRow) -> None:
    opt = optimizer(constrained_parameter(CONSTRAINTS[0]), opt_row)
    options = opt.param_groups[0]
    assert set(opt.direction.settings(options)) == set(SETTINGS[opt.direction.row(options)])
