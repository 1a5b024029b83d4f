"""Ways to meet a budget exactly, each as one training run with the same steps, batches and learning rate schedule.

Every method ends with exactly the budget's number of weights: those that only *lead* to sparsity (a penalty, a proximal
map, factors) are cut by magnitude at a share ``cut`` of training and train on at the fixed support, as pruning does.
All of them take the batches, the initial weights and the cosine schedule from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import symopt
from benchmarks.studies.runs import grid
from benchmarks.studies.tasks import Task
from symopt import recipes

__all__ = ["METHODS", "Budget", "Method", "run"]

EVERY = 10
"""Steps between two selections in pruning and in everything that follows a ramp."""


@dataclass(frozen=True)
class Budget:
    """A share of all constrained weights, ``2:4`` in each of them, or a share of the neurons of hidden layers."""

    text: str

    @property
    def share(self) -> float:
        return 0.5 if self.text == "2:4" else float(self.text.removeprefix("neurons ").removesuffix("%")) / 100

    @property
    def neurons(self) -> bool:
        return self.text.startswith("neurons")

    @property
    def pattern(self) -> bool:
        return self.text == "2:4"

    def weights(self, net: nn.Module, task: Task) -> dict[str, Tensor]:
        names = task.neurons if self.neurons else task.constrained
        found = {name: net.get_parameter(name) for name in names}
        return {n: w for n, w in found.items() if w.shape[1] % 4 == 0} if self.pattern else found

    def masks(self, weights: list[Tensor], share: float, adaptive: bool = False) -> list[Tensor]:
        """Ones where weights live when a ``share`` of them does; exact, and by magnitude or layer-adaptive."""
        weights = [w.detach() for w in weights]
        if self.pattern:
            runs = [w.abs().unflatten(1, (-1, 4)).movedim(2, -1) for w in weights]
            return [_largest(r, 2).movedim(-1, 2).flatten(1, 2) for r in runs]
        if self.neurons:
            norms = [w.flatten(1).norm(dim=1) for w in weights]
            rows = [_largest(n, max(1, round(share * len(n)))) for n in norms]
            return [
                r.reshape(-1, *[1] * (w.dim() - 1)).expand_as(w).clone() for r, w in zip(rows, weights, strict=True)
            ]
        flat = torch.cat([(_adaptive(w) if adaptive else w.abs()).flatten() for w in weights])
        mask = _largest(flat, round(share * flat.numel()))
        return [m.view_as(w) for m, w in zip(mask.split([w.numel() for w in weights]), weights, strict=True)]

    def count(self, weights: list[Tensor]) -> int:
        """Weights that live in the end."""
        if self.neurons:
            return sum(round(self.share * len(w)) * w[0].numel() for w in weights)
        n = sum(w.numel() for w in weights)
        return n // 2 if self.pattern else round(self.share * n)


def _largest(x: Tensor, k: int) -> Tensor:
    """Ones at the k largest of the last dimension."""
    return torch.zeros_like(x).scatter_(-1, x.topk(k, dim=-1).indices, 1.0)


def _adaptive(w: Tensor) -> Tensor:
    """Lee et al.'s score (LAMP, ICLR 2021)."""
    square, order = w.double().flatten().square().sort(descending=True)
    return torch.empty_like(square).scatter_(0, order, square / square.cumsum(0).clamp(min=1e-300))


# ---------------------------------------------------------------------------------------------------------- training

Hook = Callable[[int], Any]


def _train(task: Task, seed: int, net: nn.Module, opt: Any, after: Hook, before: Hook = lambda k: None) -> None:
    """The loop of all methods; ``before`` runs between backward and step, ``after`` after the step, with its number."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, task.steps, eta_min=0.01 * opt.param_groups[0]["lr"])
    batches = task.data(seed).batches()
    for k in range(task.steps):
        x, y = next(batches)
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        before(k)
        opt.step()
        cosine.step()
        after(k)


class _Cut:
    """Masks by magnitude along a ramp from ``begin`` to ``end`` (shares of training), enforced after every step."""

    def __init__(
        self, task: Task, budget: Budget, weights: list[Tensor], begin: float, end: float, adaptive: bool = False
    ) -> None:
        self.budget, self.weights, self.steps = budget, weights, task.steps
        self.begin, self.end, self.adaptive = begin, end, adaptive
        self.masks: list[Tensor] | None = None
        self.done = False

    @torch.no_grad()
    def __call__(self, k: int) -> None:
        progress = (k / self.steps - self.begin) / max(self.end - self.begin, 1 / self.steps)
        if progress > 0 and not self.done and (k % EVERY == 0 or progress >= 1):
            left = max(0.0, 1 - progress) ** 3
            share = self.budget.share
            self.masks = self.budget.masks(self.weights, share + (1 - share) * left, self.adaptive)
            self.done = progress >= 1
        if self.masks is not None:
            for w, mask in zip(self.weights, self.masks, strict=True):
                w.mul_(mask)


def _start(task: Task, seed: int, budget: Budget) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(seed)
    net = task.net()
    return net, list(budget.weights(net, task).values())


def _others(net: nn.Module, weights: list[Tensor]) -> list[Tensor]:
    mine = {id(w) for w in weights}
    return [p for p in net.parameters() if id(p) not in mine]


def dense(task: Task, seed: int, budget: Budget, *, lr: float) -> nn.Module:
    net, _ = _start(task, seed, budget)
    _train(task, seed, net, torch.optim.AdamW(net.parameters(), lr=lr, fused=True), lambda k: None)
    return net


def pruning(
    task: Task, seed: int, budget: Budget, *, lr: float, begin: float, end: float, adaptive: bool = False
) -> nn.Module:
    """Gradual magnitude pruning (Zhu & Gupta, 2017) and fine-tuning; one shot where ``begin == end``.

    ``adaptive``: between layers by the score that symopt uses, too.
    """
    net, weights = _start(task, seed, budget)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)
    _train(task, seed, net, opt, _Cut(task, budget, weights, begin, end, adaptive))
    return net


def l1(task: Task, seed: int, budget: Budget, *, lr: float, strength: float, cut: float) -> nn.Module:
    """``strength * ||w||_1`` in the loss until the cut (for neurons the sum of row norms)."""
    net, weights = _start(task, seed, budget)
    opt = torch.optim.Adam(net.parameters(), lr=lr, fused=True)

    def penalise(k: int) -> None:
        if k < cut * task.steps:
            for w in weights:
                assert w.grad is not None
                unit = w.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (w.dim() - 1))
                w.grad.add_(w.detach() / unit.detach() if budget.neurons else w.detach().sign(), alpha=strength)

    _train(task, seed, net, opt, _Cut(task, budget, weights, cut, cut), penalise)
    return net


Shrink = Callable[[Tensor, float], Any]


def _shrunk(task: Task, seed: int, budget: Budget, lr: float, cut: float, shrink: Shrink) -> nn.Module:
    """AdamW without weight decay; until the cut each step is followed by ``shrink(weight, lr)``, in place."""
    net, weights = _start(task, seed, budget)
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0, fused=True)
    end = _Cut(task, budget, weights, cut, cut)

    @torch.no_grad()
    def after(k: int) -> None:
        if k < cut * task.steps:
            for w in weights:
                shrink(w, opt.param_groups[0]["lr"])
        end(k)

    _train(task, seed, net, opt, after)
    return net


def proximal(task: Task, seed: int, budget: Budget, *, lr: float, strength: float, cut: float) -> nn.Module:
    """Adam, and after each step the proximal map of ``lr * strength * ||w||_1``."""

    def shrink(w: Tensor, now: float) -> None:
        w.copy_(w.sign() * (w.abs() - now * strength).clamp(min=0))

    return _shrunk(task, seed, budget, lr, cut, shrink)


def padam(
    task: Task, seed: int, budget: Budget, *, lr: float, strength: float, cut: float, p: float = 0.8
) -> nn.Module:
    """AdamW with the decoupled decay of ``||w||_p^p`` in its implicit, stable form (Outmezguine & Levi, 2024)."""

    def shrink(w: Tensor, now: float) -> None:
        w.div_(1 + now * strength * p * w.abs().clamp(min=1e-12) ** (p - 2))

    return _shrunk(task, seed, budget, lr, cut, shrink)


Then = Callable[[float], tuple[Any, Hook]]


def _relay(task: Task, seed: int, net: nn.Module, opt: Any, lr: float, cut: float, then: Then) -> nn.Module:
    """Like :func:`_train` with another optimizer from the cut on: ``then(lr)`` gives it and what follows its steps."""
    batches = task.data(seed).batches()
    after: Hook = lambda k: None  # noqa: E731
    for k in range(task.steps):
        now = lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * k / task.steps)))
        if k == round(cut * task.steps):
            opt, after = then(now)
        for group in opt.param_groups:
            group["lr"] = now
        x, y = next(batches)
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        after(k)
    return net


def pat(task: Task, seed: int, budget: Budget, *, lr: float, strength: float, cut: float) -> nn.Module:
    """torchao's PruneOptimizer with ProxLasso, for neurons ProxGroupLasso; its threshold grows from step to step."""
    from torchao.prototype.pat import PruneOptimizer

    net, weights = _start(task, seed, budget)
    prox = ("ProxGroupLasso", "Dim0Grouper") if budget.neurons else ("ProxLasso", "ElemGrouper")
    mine = {"params": weights, "prox_type": prox[0], "group_type": prox[1]}
    base = torch.optim.AdamW([mine, {"params": _others(net, weights)}], lr=lr, weight_decay=0.0)

    def then(now: float) -> tuple[Any, Hook]:
        return torch.optim.AdamW(net.parameters(), lr=now, fused=True), _Cut(task, budget, weights, cut, cut)

    return _relay(task, seed, net, PruneOptimizer(base, reg_lambda=strength), lr, cut, then)


def factors(task: Task, seed: int, budget: Budget, *, lr: float, strength: float, cut: float, depth: int) -> nn.Module:
    """spred (depth 2) or deep weight factorization (depth 3): SGD on factors until the cut, then on the weights."""
    net, _ = _start(task, seed, budget)
    names = list(budget.weights(net, task))
    gated = recipes.d_gating(strength, "out", depth)
    plain = recipes.spred(strength) if depth == 2 else recipes.deep_weight_factorization(strength, depth)
    recipe = gated if budget.neurons else plain
    if depth == 2 and not budget.neurons:
        # As published, factors are drawn like layers: without a normalisation their product is too small to learn.
        recipe = replace(recipe, init="balanced")
    recipe.constrain(net, *names)

    def then(now: float) -> tuple[Any, Hook]:
        symopt.release(net)
        end = _Cut(task, budget, list(budget.weights(net, task).values()), 0.0, 0.0)
        end(1)
        return torch.optim.SGD(net.parameters(), lr=now, momentum=0.9), end

    return _relay(task, seed, net, recipe.optimizer(net, lr=lr), lr, cut, then)


def _erdos_renyi(weights: list[Tensor], count: int) -> list[int]:
    """Living weights per tensor in proportion to the sum of its sizes, none above its number (Evci et al., Sec. 3)."""
    wish = [float(sum(w.shape)) for w in weights]
    counts = [0] * len(weights)
    while left := count - sum(counts):
        room = [i for i, w in enumerate(weights) if counts[i] < w.numel()]
        scale = left / sum(wish[i] for i in room)
        for i in room:
            more = max(1, int(scale * wish[i]))
            counts[i] += min(more, weights[i].numel() - counts[i], count - sum(counts))
    return counts


def rigl(task: Task, seed: int, budget: Budget, *, lr: float, renew: float, cut: float) -> nn.Module:
    """RigL (Evci et al., 2020): sparse from the start; the weakest go, those with the largest gradients come.

    Layers share the budget as there (Erdős–Rényi-kernel); the first weights are scaled up for the inputs that are
    missing (Evci et al., Gradient Flow in Sparse Neural Networks, 2022), without which 1 % does not train.
    """
    net, weights = _start(task, seed, budget)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(w.shape, generator=generator) for w in weights]
    counts = _erdos_renyi(weights, budget.count(weights))
    masks = [_largest(x.flatten(), n).view_as(x) for x, n in zip(draws, counts, strict=True)]
    with torch.no_grad():
        for w, mask in zip(weights, masks, strict=True):
            w.mul_(mask / mask.mean().sqrt())
    opt = torch.optim.AdamW(net.parameters(), lr=lr, fused=True)

    @torch.no_grad()
    def after(k: int) -> None:
        if k % 50 == 49 and k < cut * task.steps:
            share = renew / 2 * (1 + math.cos(math.pi * k / (cut * task.steps)))
            for w, mask in zip(weights, masks, strict=True):
                assert w.grad is not None
                living = int(mask.sum())
                n = min(int(share * living), w.numel() - living)
                kept = _largest((w.abs() + 1e-9).mul(mask).flatten(), living - n)
                grown = _largest(w.grad.abs().flatten() * (1 - mask.flatten()) - mask.flatten(), n)
                mask.copy_((kept + grown).view_as(mask))
                opt.state[w]["exp_avg"].mul_(mask)
        for w, mask in zip(weights, masks, strict=True):
            w.mul_(mask)

    _train(task, seed, net, opt, after)
    return net


def _symopt(make: Any, task: Task, seed: int, budget: Budget, plan: Any, **options: Any) -> nn.Module:
    net, _ = _start(task, seed, budget)
    names = tuple(budget.weights(net, task))
    constraint: Any = (
        symopt.Sparse(pattern="2:4")
        if budget.pattern
        else symopt.GroupSparse("out", keep=budget.share)
        if budget.neurons
        else symopt.Sparse(density=budget.share, scope="global")
    )
    symopt.constrain(net, {names: constraint})
    opt = make(net, total_steps=task.steps, **options)
    opt.schedule.plan = plan
    _train(task, seed, net, opt, lambda k: None)
    return net


def ours(task: Task, seed: int, budget: Budget, *, lr: float, plan: Any = None, **options: Any) -> nn.Module:
    return _symopt(symopt.AdamW, task, seed, budget, plan, lr=lr, fused=True, **options)


def ours_sgd(task: Task, seed: int, budget: Budget, *, lr: float, plan: Any = None) -> nn.Module:
    return _symopt(symopt.SGD, task, seed, budget, plan, lr=lr, momentum=0.9)


def run(method: str, task: Task, seed: int, budget: Budget, **setting: Any) -> dict[str, Any]:
    """Train once; validation and test score, and how many of the weights with a budget live."""
    net = METHODS[method].train(task, seed, budget, **setting)
    data = task.data(seed)
    weights = [net.get_parameter(name).detach() for name in budget.weights(net, task)]
    if budget.neurons:  # a weight of a living neuron may be zero by chance
        weights = [w.flatten(1).any(1, keepdim=True).expand(w.flatten(1).shape) for w in weights]
    return {
        "validation": task.score(net, data.validation),
        "test": task.score(net, data.test),
        "alive": sum(int((w != 0).sum()) for w in weights),
        "budget": budget.count(weights),
    }


@dataclass(frozen=True)
class Method:
    """A training function and the grid of settings it is tuned on."""

    train: Callable[..., nn.Module]
    grid: tuple[dict[str, Any], ...]
    patterns: bool = True
    """Whether 2:4 and neurons are something else to it than to the others."""

    def takes(self, budget: Budget) -> bool:
        return self.patterns or not (budget.pattern or budget.neurons)


_RATES = (3e-3, 6e-3, 1.2e-2)
_TWO = _RATES[:2]
_WINDOWS = grid(lr=_RATES, begin=(0.1,), end=(0.6, 0.8)) + grid(lr=_RATES, begin=(0.3,), end=(0.6,))

METHODS: dict[str, Method] = {
    "symopt AdamW": Method(ours, ({"lr": 1e-2},)),
    "symopt AdamW, lr tuned": Method(ours, grid(lr=(5e-3, 1e-2, 2e-2))),
    "symopt SGD": Method(ours_sgd, ({"lr": 0.1},)),
    "dense": Method(dense, grid(lr=(1e-3, 3e-3))),
    "gradual pruning": Method(pruning, _WINDOWS),
    "gradual pruning, LAMP": Method(
        pruning, tuple({**window, "adaptive": True} for window in _WINDOWS), patterns=False
    ),
    "one-shot pruning": Method(
        pruning, tuple({"lr": lr, "begin": b, "end": b} for lr in (1e-3, 3e-3) for b in (0.2, 0.5))
    ),
    "l1": Method(l1, grid(lr=_TWO, strength=(3e-4, 1e-3, 3e-3), cut=(0.4, 0.7))),
    "proximal l1": Method(proximal, grid(lr=_TWO, strength=(0.1, 0.3), cut=(0.4, 0.7))),
    "PAdam": Method(padam, grid(lr=_TWO, strength=(0.1, 0.3), cut=(0.4, 0.7))),
    "PAT": Method(pat, grid(lr=_TWO, strength=(0.03, 0.1), cut=(0.4, 0.7))),
    "spred": Method(lambda *a, **k: factors(*a, depth=2, **k), grid(lr=(0.1, 0.3), strength=(5e-4, 2e-3), cut=(0.7,))),
    "deep factors": Method(
        lambda *a, **k: factors(*a, depth=3, **k), grid(lr=(0.1, 0.3, 0.5), strength=(1e-4, 3e-4), cut=(0.7,))
    ),
    "RigL": Method(rigl, grid(lr=(3e-3, 6e-3, 1.2e-2), renew=(0.3, 0.5), cut=(0.75,)), patterns=False),
}
