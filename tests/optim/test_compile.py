"""torch.compile of the step: one operator, no graph break, no recompilation over a schedule, the eager numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import symopt
from support.table import ANY_SHAPE, CONSTRAINTS, CPU_BACKENDS, available

pytestmark = pytest.mark.filterwarnings("ignore:Profiler record function")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(row, seed: int = 0) -> torch.nn.Module:
    """One constrained weight and two plain parameters."""
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Module()
    for name, shape in (("weight", row.shape), ("bias", (3,)), ("scale", ())):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        module.register_parameter(name, torch.nn.Parameter(value))
    return symopt.constrain(module, {"weight": row.make(0.3)})


def push(module: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def state_of(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [v for p in opt.state for v in opt.state[p].values() if isinstance(v, torch.Tensor)]


COMPILED = [
    pytest.param(row, opt_row, backend, id=f"{row.id}-{opt_row.id}-{backend}")
    for row in (CONSTRAINTS[0], CONSTRAINTS[3], CONSTRAINTS[-1])
    for opt_row in ANY_SHAPE
    for backend in CPU_BACKENDS
    if available(row, opt_row, backend)
]


@pytest.mark.parametrize(("row", "opt_row", "backend"), COMPILED)
def test_compiled_steps_are_eager_steps(row, opt_row, backend):
    nets = [network(row), network(row)]
    opts = [opt_row.cls(net, lr=opt_row.lr, backend=backend, **opt_row.options) for net in nets]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(opts[1].step, backend=counter, fullgraph=True)
    for step in range(6):
        for net in nets:
            push(net, step)
        opts[0].step()
        compiled()
        for opt in opts:  # by hand: Dynamo refuses to enter the wrapper that a scheduler puts around any step
            opt.param_groups[0]["lr"] *= 0.8
            opt.param_groups[0]["strength"] = 0.1 * step
        for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(state_of(opts[0]), state_of(opts[1]), strict=True):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1
    assert counter.op_count <= 3  # grad mode off, the step, grad mode on


def test_inductor():
    nets = [network(CONSTRAINTS[0]), network(CONSTRAINTS[0])]
    opts = [symopt.AdamW(net, lr=0.01) for net in nets]
    compiled = torch.compile(opts[1].step, fullgraph=True)
    for step in range(3):
        for net in nets:
            push(net, step)
        opts[0].step()
        compiled()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_arithmetic_before_the_step_in_the_same_graph_counts():
    """The compiler may hand the operator a copy of a weight that the graph has changed before."""
    nets = [network(CONSTRAINTS[0]), network(CONSTRAINTS[0])]
    opts = [symopt.SGD(net, lr=0.01) for net in nets]

    def halve_and_step(net, opt):
        with torch.no_grad():
            net.weight.mul_(0.5)
            net.weight.grad.add_(1.0)
        opt.step()
        with torch.no_grad():
            return net.weight * 2

    compiled = torch.compile(halve_and_step, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for net in nets:
            push(net, step)
        assert torch.equal(halve_and_step(nets[0], opts[0]), compiled(nets[1], opts[1]))
        assert torch.equal(nets[0].weight, nets[1].weight)


def test_a_copied_optimizer_steps_its_own_parameters():
    net = network(CONSTRAINTS[0])
    opt = symopt.AdamW(net, lr=0.01)
    net2, opt2 = copy.deepcopy((net, opt))
    push(net2, 0)
    before = [p.detach().clone() for p in net.parameters()]
    torch.compile(opt2.step, backend="eager", fullgraph=True)()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(net2.parameters(), before, strict=True))


def test_a_parameter_that_gets_a_gradient_later_is_stepped():
    net = network(CONSTRAINTS[0])
    opt = symopt.SGD(net, lr=0.1)
    compiled = torch.compile(opt.step, backend="eager", fullgraph=True)
    push(net, 0)
    net.bias.grad = None
    before = net.bias.detach().clone()
    compiled()
    assert torch.equal(net.bias, before)
    push(net, 1)
    compiled()
    assert not torch.equal(net.bias, before)


def test_added_parameters_are_stepped_too():
    net = network(CONSTRAINTS[0])
    opt = symopt.SGD(net, lr=0.1)
    compiled = torch.compile(opt.step, backend="eager", fullgraph=True)
    push(net, 0)
    compiled()
    extra = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [("extra", extra)]})
    extra.grad = torch.ones(2)
    compiled()
    assert torch.equal(extra, torch.full((2,), 0.9))
