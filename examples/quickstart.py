"""Train LeNet-300-100 on MNIST three times with one training function: dense, with sparse weights, with few neurons.

The runs share data, initial weights, order of minibatches and learning rate. What differs stands in `main`: a line
names the constraint, and the optimizer is symopt's, which knows the number of steps, so zeros are final by the end.

    python examples/quickstart.py            about a minute on two cores
    python examples/quickstart.py --quick    a few epochs, to see that everything works
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import mnist
import picture
import symopt

console = Console()
BATCH = 64


def lenet(seed: int) -> nn.Sequential:
    """Build LeNet-300-100; the same seed gives the same initial weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


# ---- training: plain PyTorch, knows nothing of constraints ----------------------------------------------------------


def steps(data: mnist.Split, epochs: int) -> int:
    """Count the minibatches of so many epochs."""
    return epochs * math.ceil(len(data.train_x) / BATCH)


def train(name: str, net: nn.Module, opt: torch.optim.Optimizer, data: mnist.Split, epochs: int) -> picture.Run:
    """Train on shuffled minibatches with a cosine learning rate."""
    cosine = CosineAnnealingLR(opt, steps(data, epochs))
    run, start = picture.Run(name, net), time.perf_counter()
    shuffle = torch.Generator().manual_seed(0)
    columns = TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.fields[seen]}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=epochs, seen="")
        for _ in range(epochs):
            for rows in torch.randperm(len(data.train_x), generator=shuffle).split(BATCH):
                loss = nn.functional.cross_entropy(net(data.train_x[rows]), data.train_y[rows])
                opt.zero_grad()
                loss.backward()
                opt.step()
                cosine.step()
            run.accuracy.append(accuracy(net, data.test_x, data.test_y))
            run.alive.append(1 - zeros(net))
            bar.update(task, advance=1, seen=f"{run.accuracy[-1]:.1%} correct, {run.alive[-1]:6.1%} alive")
    seconds = time.perf_counter() - start
    console.print(f"{name:24} {run.accuracy[-1]:.1%} correct, {run.alive[-1]:6.1%} of weights alive, {seconds:.1f} s")
    return run


# ---- measuring ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images whose digit the network gets right."""
    return float((net(x).argmax(1) == y).float().mean())


def zeros(net: nn.Module) -> float:
    """Share of the weights that are exactly zero."""
    weights = picture.matrices(net)
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@torch.inference_mode()
def latencies(nets: Sequence[nn.Module], x: Tensor, repeats: int) -> list[float]:
    """Median milliseconds of a forward pass of each network, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: list[list[float]] = [[] for _ in nets]
    # Taking turns spreads whatever else the machine does over all networks alike.
    for _ in range(repeats):
        for net, taken in zip(nets, seconds, strict=True):
            start = time.perf_counter()
            net(x)
            taken.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return [1e3 * statistics.median(taken) for taken in seconds]


RELOAD = """
import sys
sys.modules["symopt"] = sys.modules["symopt_kernels"] = None  # importing either now raises
import torch
torch.set_num_threads(int(sys.argv[3]))
net = torch.load(sys.argv[1], weights_only=False)
x, y = torch.load(sys.argv[2])
print((net(x).argmax(1) == y).float().mean().item())
"""


def accuracy_without_symopt(model: Path, x: Tensor, y: Tensor) -> float:
    """Evaluate a saved network in a fresh Python in which symopt cannot be imported."""
    held_out = model.with_name("held_out.pt")
    torch.save((x, y), held_out)
    command = [sys.executable, "-c", RELOAD, str(model), str(held_out), str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


# ---- showing --------------------------------------------------------------------------------------------------------


def file_name(network: str) -> str:
    """Name the file of a network."""
    return network.replace(",", "").replace(" ", "_") + ".pt"


def table(nets: dict[str, nn.Module], data: mnist.Split, out: Path, repeats: int) -> Table:
    """Save and measure every network and lay the figures out."""
    one, many = (latencies(list(nets.values()), data.test_x[:size], repeats) for size in (1, 256))
    title = "LeNet-300-100, 1 000 test images; median latency on 1 thread"
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for header in ("", "correct", "zeros", "parameters", "file\nKB", "batch 1\nms", "batch 256\nms"):
        result.add_column(header, justify="right" if header else "left", no_wrap=True)
    for (name, net), fast, slow in zip(nets.items(), one, many, strict=True):
        path = out / file_name(name)
        torch.save(net, path)
        result.add_row(
            name,
            f"{accuracy(net, data.test_x, data.test_y):.1%}",
            f"{zeros(net):.1%}",
            f"{sum(p.numel() for p in net.parameters()):,}",
            f"{path.stat().st_size / 1024:,.0f}",
            f"{fast:.3f}",
            f"{slow:.3f}",
        )
    return result


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, help="default 30, with --quick 8")
    parser.add_argument("--lr", type=float, help="of all three runs; default 0.01, with --quick 0.03")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="for training; more do not help so small a network")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the models and the picture")
    parser.add_argument("--quick", action="store_true", help="fewer, larger steps and fewer timings")
    args = parser.parse_args()
    args.epochs = args.epochs or (8 if args.quick else 30)
    args.lr = args.lr or (0.03 if args.quick else 0.01)
    return args


def main() -> None:
    """Train, compare, fold, save, reload, draw."""
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    data = mnist.load(args.seed)
    total = steps(data, args.epochs)

    net = lenet(args.seed)
    opt: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    dense = train("dense", net, opt, data, args.epochs)

    net = lenet(args.seed)
    symopt.constrain(net, {"*.weight": symopt.Sparse()})
    opt = symopt.AdamW(net, lr=args.lr, total_steps=total)
    sparse = train("sparse", net, opt, data, args.epochs)
    console.print(symopt.report(net, opt))

    net = lenet(args.seed)
    symopt.constrain(net, {("0.weight", "2.weight"): symopt.GroupSparse("out")})
    opt = symopt.AdamW(net, lr=args.lr, total_steps=total)
    few = train("few neurons", net, opt, data, args.epochs)
    console.print(symopt.report(net, opt))

    folded = symopt.fold(few.net)
    nets = {
        "dense": dense.net,
        "sparse": sparse.net,
        "sparse, folded": symopt.fold(sparse.net),
        "few neurons": few.net,
        "few neurons, folded": folded,
    }
    console.print(table(nets, data, args.out, repeats=50 if args.quick else 500))

    here = accuracy(folded, data.test_x, data.test_y)
    there = accuracy_without_symopt(args.out / file_name("few neurons, folded"), data.test_x, data.test_y)
    if here != there:
        raise SystemExit(f"the folded network got {there:.1%} right once reloaded, {here:.1%} before")
    console.print(f"folded network reloaded in a Python without symopt: {there:.1%} correct, as here")

    picture.draw(dense, sparse, few, args.out / "quickstart.png")
    console.print(f"picture and models are in {args.out}/")


if __name__ == "__main__":
    main()
