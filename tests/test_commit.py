"""What Anneal's commit promises: from then on what is zero stays zero, in every gauge."""

import pytest
import torch

import symopt
from symopt_kernels import reference

MAKE = {
    "fixed": lambda: symopt.Sparse(0.5),
    "free": lambda: symopt.Sparse(0.5, gauge="free"),
    "free-depth-3": lambda: symopt.Sparse(0.5, depth=3, gauge="free"),
    "depth-3": lambda: symopt.Sparse(0.5, depth=3),
    "group": lambda: symopt.GroupSparse("out", 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKE)
def test_committed_zeros_stay_zero_in_a_network(kind, dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)).to(dtype)
    symopt.constrain(net, {"0.weight": MAKE[kind]()})
    opt = symopt.AdamW(net, lr=2e-2)
    anneal = symopt.Anneal(opt, 500, commit=0.8)
    x = torch.randn(256, 10)
    y = (x[:, 0] * x[:, 1] > 0).long()
    dead = None
    for k in range(500):
        if k == 400:  # the next step is the first with strength 0
            dead = net[0].weight == 0
        rows = torch.randint(0, 256, (32,))
        opt.zero_grad()
        torch.nn.functional.cross_entropy(net(x[rows].to(dtype)).float(), y[rows]).backward()
        opt.step()
        anneal.step()
    assert dead is not None and bool(dead.any())
    assert bool((net[0].weight[dead] == 0).all())


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("keep", [0.9, 0.0])
def test_rebalancing_a_zero_scales_what_is_left_of_it(depth, keep):
    factors = (torch.zeros(3), *(torch.tensor([1.0, 1e-3, 4.0]) for _ in range(depth - 1)))
    new = reference.rebalance(factors, keep)
    for before, after in zip(factors, new, strict=True):
        torch.testing.assert_close(after * after, keep * before * before, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_full_balance_keeps_small_weights(depth):
    factors = (torch.tensor([1e-6, -1e-9, 2.0], dtype=torch.float64),) + (torch.ones(3, dtype=torch.float64),) * (
        depth - 1
    )
    new = reference.rebalance(factors, 0.0)
    torch.testing.assert_close(reference.product(new), factors[0], rtol=1e-12, atol=0.0)
