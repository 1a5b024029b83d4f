"""Folded models are plain modules: export, ONNX Runtime and safetensors give the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import symopt

X = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def folded(constraint: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))
    symopt.constrain(net, {"0.weight": constraint})
    opt = symopt.AdamW(net, lr=2e-2, total_steps=100)
    for _ in range(100):
        opt.zero_grad()
        net(X).square().mean().backward()
        opt.step()
    return symopt.fold(net.eval(), X)


KINDS = {
    "filters": lambda: symopt.GroupSparse("out", keep=3),
    "weights": lambda: symopt.Sparse(density=0.3),
    "rank": lambda: symopt.LowRank(rank=2),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.filterwarnings("ignore:.*too few")
def test_torch_export(kind: str, tmp_path: Path) -> None:
    small = folded(KINDS[kind]())
    torch.export.save(torch.export.export(small, (X,)), tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(again(X), small(X), rtol=0, atol=0)


@kinds
@pytest.mark.filterwarnings("ignore:.*too few")
def test_onnx_runtime(kind: str, tmp_path: Path) -> None:
    import onnxruntime

    small = folded(KINDS[kind]())
    torch.onnx.export(small, (X,), tmp_path / "net.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), small(X).detach(), rtol=1e-5, atol=1e-6)


@kinds
@pytest.mark.filterwarnings("ignore:.*too few")
def test_safetensors(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    small = folded(KINDS[kind]())
    save_file(small.state_dict(), tmp_path / "net.safetensors")
    loaded = load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(value, loaded[key]) for key, value in small.state_dict().items())
