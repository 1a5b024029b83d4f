"""PyTorch's own optimizer tests, run on symopt's: its tables of settings, errors and schedulers, its behaviours.

``OptimizerInfo`` and ``@optims`` come with torch (torch.testing._internal.common_optimizers), the test bodies do not.
The behaviours are those of pytorch/test/test_optim.py, asked of a constrained weight, a plain bias and both in a group.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optims,
)
from torch.testing._internal.common_utils import TestCase

import symopt
from support.table import CONSTRAINTS, OPTIMIZERS, ConstraintRow, constrained_parameter
from support.tolerances import tolerance

STEPS = 20
ROWS = [
    # One row a class, so that a new constraint is here by itself, and the forms that take other paths.
    *{type(row.make(None)): row for row in reversed(CONSTRAINTS)}.values(),
    *(row for row in CONSTRAINTS if row.id in ("group-in-conv", "group-index")),
    ConstraintRow("free", lambda k: symopt.Sparse(strength=k, gauge="free"), (6, 5)),
    ConstraintRow("deep", lambda k: symopt.Sparse(strength=k, depth=3), (6, 5)),
]


class Info(OptimizerInfo):
    """torch's entry for an optimizer, with symopt's class in its place and a constraint."""

    row: ConstraintRow
    torch_cls: type[torch.optim.Optimizer]

    @property
    def name(self) -> str:
        return f"{self.optim_cls.__name__}_{self.row.id.replace('-', '_')}"


def info(theirs: OptimizerInfo, cls: type[torch.optim.Optimizer], row: ConstraintRow) -> Info:
    ours = copy.copy(theirs)
    ours.__class__ = Info
    ours.torch_cls, ours.optim_cls, ours.row = theirs.optim_cls, cls, row  # type: ignore[attr-defined]
    return ours  # type: ignore[return-value]


CLASSES = {row.torch_cls: row.cls for row in OPTIMIZERS}
DB = [
    info(theirs, CLASSES[theirs.optim_cls], row) for theirs in optim_db if theirs.optim_cls in CLASSES for row in ROWS
]


def network(row: ConstraintRow, *, strength: float = 1e-3, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = constrained_parameter(row, strength=strength, dtype=dtype)
    module.bias = nn.Parameter(torch.linspace(-1, 1, 7, dtype=dtype))
    return module


def inputs(info: Info) -> list[dict[str, Any]]:
    """All of torch's settings; ``differentiable`` needs weights that are no leaves (test_parity.py has it)."""
    listed = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info, skip=("differentiable",))
    return [copy.deepcopy(each.kwargs) for each in listed]


def loss_of(module: nn.Module) -> Tensor:
    return torch.stack([(p.double() - k).square().sum() for k, p in enumerate(module.parameters())]).sum()


def step(module: nn.Module, opt: Any) -> float:
    opt.zero_grad()
    loss = loss_of(module)
    loss.backward()
    opt.step()
    return loss.item()


def train(module: nn.Module, opt: Any, steps: int = 3) -> None:
    for _ in range(steps):
        step(module, opt)


def round_trip(packed: Any) -> Any:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestConformance(TestCase):
    exact_dtype = True

    def assert_same(self, one: Any, two: Any) -> None:
        """Weights, state and settings of two (module, optimizer), to the bit."""
        self.assertEqual(list(one[0].parameters()), list(two[0].parameters()), rtol=0, atol=0)
        self.assertEqual(one[1].state_dict(), two[1].state_dict(), rtol=0, atol=0)

    @optims(DB)
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given, seen = case.optimizer_error_input, []
            for cls in (optim_info.torch_cls, optim_info.optim_cls):
                params = given.params or list(network(optim_info.row).parameters())
                with self.assertRaises(Exception) as caught:  # a warning is an error here
                    opt = cls(params, **given.kwargs)
                    assert case.error_on == OptimizerErrorEnum.STEP_ERROR
                    opt.step()
                seen.append((type(caught.exception), str(caught.exception)))
            self.assertTrue(issubclass(seen[1][0], case.error_type), seen)
            self.assertRegex(seen[1][1], case.error_regex)
            self.assertEqual(*seen)

    @optims(DB)
    def test_goes_the_right_way(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for kwargs in inputs(optim_info):
            module = network(optim_info.row)
            opt = optim_info.optim_cls(module, **kwargs)
            losses = [step(module, opt) for _ in range(STEPS)]
            self.assertTrue(losses[-1] > losses[0] if kwargs.get("maximize") else losses[-1] < losses[0], kwargs)

    @optims(DB)
    def test_goes_the_right_way_with_schedulers(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for make in optim_info.scheduler_inputs:
            module = network(optim_info.row)
            opt = optim_info.optim_cls(module, lr=0.01)
            schedulers, losses = [each(opt) for each in make], []
            for _ in range(STEPS):
                losses.append(step(module, opt))
                for scheduler in schedulers:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([losses[-1]] if plateau else []))
            self.assertLess(losses[-1], losses[0])

    @optims(DB)
    def test_param_groups_have_their_own_lr_and_weight_decay(
        self, device: str, dtype: torch.dtype, optim_info: Info
    ) -> None:
        module, still = network(optim_info.row), network(optim_info.row)
        opt = optim_info.optim_cls(
            [
                {"params": module.parameters(), "lr": 0.01},
                {"params": [still.weight], "lr": 0.0},
                {"params": [still.bias], "lr": 0.0, "weight_decay": 0.5},
            ],
            lr=123.0,
        )
        before = copy.deepcopy(still)
        for _ in range(3):
            opt.zero_grad()
            (loss_of(module) + loss_of(still)).backward()
            opt.step()
        self.assertEqual(list(still.parameters()), list(before.parameters()), rtol=0, atol=0)
        self.assertFalse(torch.equal(module.weight, before.weight))

    @optims(DB)
    def test_tensor_lr_is_a_number(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for kwargs in inputs(optim_info):
            if kwargs.get("foreach") or kwargs.get("fused") or isinstance(kwargs.get("lr"), Tensor):
                continue  # torch wants capturable for the first, and takes 0-dim tensors as numbers in the second
            lr, pairs = kwargs.pop("lr", 1e-3), []
            for given in (lr, torch.tensor(lr, dtype=torch.float64)):
                module = network(optim_info.row, dtype=torch.float64)
                pairs.append((module, optim_info.optim_cls(module, lr=given, **kwargs)))
                train(*pairs[-1], STEPS)
            for p, q in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
                self.assertEqual(p, q, rtol=0, atol=tolerance("factor step"))

    @optims(DB)
    def test_foreach_and_fused_match_the_loop(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        """A constrained weight to the bit (it takes symopt's own step); the plain ones as closely as torch's do."""
        for each in optim_info.optim_inputs_func(device=device):
            ends = []
            for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
                module = network(optim_info.row)
                module.wide = nn.Parameter(torch.linspace(-2, 2, 5, dtype=torch.float64))  # dtypes may mix in a group
                opt = optim_info.optim_cls(module, **copy.deepcopy(each.kwargs), **how)
                train(module, opt, STEPS)
                ends.append(module)
            for other in ends[1:]:
                self.assertEqual(ends[0].weight, other.weight, rtol=0, atol=0)
                self.assertEqual(list(ends[0].parameters()), list(other.parameters()))

    @optims(DB)
    def test_step_is_noop_without_gradients(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for kwargs in inputs(optim_info):
            module = network(optim_info.row)
            before, opt = copy.deepcopy(module), optim_info.optim_cls(module, **kwargs)
            for p in module.parameters():
                p.grad = None
            opt.step()
            self.assertEqual(list(module.parameters()), list(before.parameters()), rtol=0, atol=0)
            self.assertTrue(all(set(state) == {"progress"} for state in opt.state_dict()["state"].values()))

    @optims(DB)
    def test_step_is_noop_for_zero_gradients_without_decay(
        self, device: str, dtype: torch.dtype, optim_info: Info
    ) -> None:
        for kwargs in inputs(optim_info):
            for off in ({"strength": 0.0, "weight_decay": 0.0}, {"lr": 0.0}):
                module = network(optim_info.row)
                before, opt = copy.deepcopy(module), optim_info.optim_cls(module, **{**kwargs, **off})
                for _ in range(3):
                    for p in module.parameters():
                        p.grad = torch.zeros_like(p)
                    opt.step()
                self.assertEqual(list(module.parameters()), list(before.parameters()), rtol=0, atol=0)

    @optims(DB)
    def test_can_be_printed(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        text = repr(optim_info.optim_cls(network(optim_info.row), lr=0.125))
        for part in (optim_info.optim_cls.__name__, "Parameter Group 0", "lr: 0.125", "strength: None"):
            self.assertIn(part, text)

    @optims(DB)
    def test_state_dict_is_deterministic(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for kwargs in inputs(optim_info):
            module = network(optim_info.row)
            opt = optim_info.optim_cls(module, **kwargs)
            train(module, opt)
            twin = copy.deepcopy(module)
            other = optim_info.optim_cls(twin, **kwargs)
            other.load_state_dict(round_trip(opt.state_dict()))  # and weights_only loading loses nothing
            self.assert_same((module, opt), (twin, other))
            self.assertEqual(str(symopt.report(twin, other)), str(symopt.report(module, opt)))
            train(module, opt)
            train(twin, other)
            self.assert_same((module, opt), (twin, other))

    @optims(DB)
    def test_can_load_older_state_dict(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        """Group options that did not exist yet, torch's and symopt's, and ``step`` as a plain number."""
        for kwargs in inputs(optim_info):
            if kwargs.get("maximize") or kwargs.get("fused"):
                continue  # an old file knows of neither, so the rest would be another run
            module = network(optim_info.row)
            opt = optim_info.optim_cls(module, **kwargs)
            train(module, opt)
            old = copy.deepcopy(opt.state_dict())
            for group in old["param_groups"]:
                for flag in (*optim_info.not_og_supported_flags, *symopt.optim.options.DEFAULTS):
                    group.pop(flag, None)
            for state in old["state"].values():
                if "step" in state:
                    state["step"] = int(state["step"])
            twin = copy.deepcopy(module)
            other = optim_info.optim_cls(twin, **kwargs)
            other.load_state_dict(old)
            train(module, opt)
            train(twin, other)
            self.assertEqual(list(module.parameters()), list(twin.parameters()), rtol=0, atol=0)

    @optims(DB)
    def test_named_and_unnamed_state_dicts_load_into_each_other(
        self, device: str, dtype: torch.dtype, optim_info: Info
    ) -> None:
        forms = (lambda m: m.named_parameters(), lambda m: m.parameters())
        for save in forms:
            for load in forms:
                module = network(optim_info.row)
                opt = optim_info.optim_cls(save(module), lr=0.01)
                train(module, opt)
                twin = copy.deepcopy(module)
                other = optim_info.optim_cls(load(twin), lr=0.5)
                other.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch shares tensors
                train(module, opt)
                train(twin, other)
                self.assertEqual(list(module.parameters()), list(twin.parameters()), rtol=0, atol=0)
                self.assertEqual("param_names" in other.param_groups[0], forms[0] in (save, load))  # as in torch

    @optims(DB)
    def test_deepcopy_copies_all_public_attributes(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for kwargs in inputs(optim_info):
            module = network(optim_info.row)
            opt = optim_info.optim_cls(module, **kwargs)
            train(module, opt, 1)
            twin, other = copy.deepcopy((module, opt))
            self.assertEqual({k for k in vars(opt) if k[0] != "_"}, {k for k in vars(other) if k[0] != "_"})
            train(module, opt)
            train(twin, other)
            self.assert_same((module, opt), (twin, other))

    @optims(DB)
    def test_every_parameter_gets_state_where_torchs_does(
        self, device: str, dtype: torch.dtype, optim_info: Info
    ) -> None:
        for kwargs in inputs(optim_info):
            module, theirs = network(optim_info.row), network(optim_info.row)
            opt = optim_info.optim_cls(module, **kwargs)
            symopt.release(theirs)
            reference = optim_info.torch_cls(theirs.parameters(), **kwargs)
            train(module, opt, 1)
            train(theirs, reference, 1)
            for p, q in zip(module.parameters(), theirs.parameters(), strict=True):
                self.assertLessEqual(set(reference.state[q]), set(opt.state[p]))


instantiate_device_type_tests(TestConformance, globals(), only_for="cpu")
