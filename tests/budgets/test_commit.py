"""What a commit promises: from then on what is zero stays zero, in every gauge."""

import io

import pytest
import torch

import symopt
from support.tolerances import tolerance
from symopt_kernels.reference import elementwise, gauge

MAKE = {
    "fixed": lambda: symopt.Sparse(strength=0.5),
    "free": lambda: symopt.Sparse(strength=0.5, gauge="free"),
    "free-depth-3": lambda: symopt.Sparse(strength=0.5, depth=3, gauge="free"),
    "depth-3": lambda: symopt.Sparse(strength=0.5, depth=3),
    "group": lambda: symopt.GroupSparse("out", strength=0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.* all of its weights have become zero")
@pytest.mark.parametrize("kind", MAKE)
def test_committed_zeros_stay_zero_in_a_network(kind, dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)).to(dtype)
    symopt.constrain(net, {"0.weight": MAKE[kind]()})
    opt = symopt.AdamW(net, lr=2e-2, total_steps=500, commit=0.8)
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
    assert dead is not None and bool(dead.any())
    assert bool((net[0].weight[dead] == 0).all())


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("keep", [0.9, 0.0])
def test_rebalancing_a_zero_scales_what_is_left_of_it(depth, keep):
    factors = (torch.zeros(3), *(torch.tensor([1.0, 1e-3, 4.0]) for _ in range(depth - 1)))
    new = elementwise.rebalance(factors, keep)
    for before, after in zip(factors, new, strict=True):
        torch.testing.assert_close(after * after, keep * before * before, rtol=tolerance("fp32"), atol=0.0)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_full_balance_keeps_small_weights(depth):
    factors = (torch.tensor([1e-6, -1e-9, 2.0], dtype=torch.float64),) + (torch.ones(3, dtype=torch.float64),) * (
        depth - 1
    )
    new = elementwise.rebalance(factors, 0.0)
    torch.testing.assert_close(gauge.product(new), factors[0], rtol=tolerance("factor step"), atol=0.0)


def test_report_of_an_explicit_module_is_that_of_its_plain_weights():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[0] = 0
    twin = torch.nn.Linear(6, 4)
    twin.load_state_dict(layer.state_dict())
    explicit = symopt.constrain(layer, {"weight": symopt.Sparse(strength=0.1)}, mode="explicit")
    plain = symopt.constrain(twin, {"weight": symopt.Sparse(strength=0.1)})
    one, two = symopt.report(explicit), symopt.report(plain)
    assert (one.parameters, one.constrained, one.zeros) == (two.parameters, two.constrained, two.zeros) == (28, 24, 6)
    assert one.parameters_folded is two.parameters_folded is None
    assert one.rows[0].zeros == two.rows[0].zeros == 6 and one.unconstrained == two.unconstrained == ("bias",)
    assert one.rows[0].penalty == pytest.approx(two.rows[0].penalty, rel=tolerance("fp32"))


@pytest.mark.filterwarnings("ignore:.* all of its weights have become zero")
def test_report_says_committed():
    net = symopt.constrain(torch.nn.Linear(4, 2), {"weight": symopt.Sparse(strength=50.0)})
    opt = symopt.AdamW(net, lr=0.1, total_steps=10, commit=0.5)
    seen = []
    for _ in range(6):
        seen.append((symopt.report(net, opt).rows[0].committed, "committed" in str(symopt.report(net, opt))))
        net(torch.ones(1, 4)).sum().backward()
        opt.step()
    assert seen[0] == (False, False) and seen[-1] == (True, True)


def warning_of(make, **options):
    torch.manual_seed(0)
    net = symopt.constrain(torch.nn.Linear(16, 4), {"weight": make})
    max_lr = options.pop("max_lr", None)
    opt = symopt.AdamW(net, **{"lr": 1e-3, **options})
    if max_lr is not None:
        torch.optim.lr_scheduler.OneCycleLR(opt, max_lr, total_steps=100, cycle_momentum=False)
    net(torch.randn(3, 16)).sum().backward()
    with pytest.warns(UserWarning, match="too few") as caught:
        opt.step()
    return caught[0]


def steps_of(warning) -> int:
    return int(str(warning.message).rsplit(", or ", 1)[1].split()[0])


def test_the_warning_points_here_and_counts_only_the_steps_with_strength():
    whole = warning_of(symopt.Sparse(strength=0.1), total_steps=10)
    half = warning_of(symopt.Sparse(strength=0.1), total_steps=10, commit=0.5)
    assert whole.filename == __file__
    assert "before the commit" in str(half.message) and abs(steps_of(half) - 2 * steps_of(whole)) <= 2


def test_the_warning_judges_by_the_peak_of_a_warmup():
    peak = warning_of(symopt.Sparse(strength=0.1), lr=1e-3, total_steps=10)
    assert abs(steps_of(warning_of(symopt.Sparse(strength=0.1), max_lr=1e-3, total_steps=10)) - steps_of(peak)) <= 1


def test_the_warning_of_a_list_names_a_factor_and_no_multiplier():
    message = str(
        warning_of([symopt.Sparse(strength=0.1), symopt.GroupSparse("out", strength=0.1)], total_steps=10).message
    )
    assert "times as large" in message and "strength >=" not in message


def test_report_leaves_every_submodule_in_its_mode():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    symopt.constrain(net, {"0.weight": symopt.Sparse()})
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert symopt.report(net, example_inputs=torch.randn(5, 4)).flops == 2 * (4 * 3 + 3 * 2)
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("width", [60, 80, 120, 240])
def test_a_narrow_terminal_loses_nothing_of_a_report(width):
    from rich.console import Console

    net = torch.nn.Sequential(torch.nn.Linear(784, 300), torch.nn.ReLU(), torch.nn.Linear(300, 100))
    report = symopt.report(symopt.constrain(net, {"0.weight": symopt.GroupSparse("out"), "*.weight": symopt.Sparse()}))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    printed = console.export_text()
    assert "…" not in printed
    assert [cell for line in report._cells() for cell in line if cell not in printed] == []
