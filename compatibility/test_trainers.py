"""The examples under other people's trainers: the constraint holds, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "trainers"))

few_steps = pytest.mark.filterwarnings("ignore:.*too few")


def same(one: Any, two: Any) -> None:
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def rows_alive(weight: torch.Tensor) -> int:
    return int(weight.any(1).sum())


def test_examples_are_short() -> None:
    for path in (Path(__file__).parents[1] / "examples" / "trainers").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path


def test_plain_loop(tmp_path: Path) -> None:
    import plain_loop

    (tmp_path / "whole").mkdir()
    whole = plain_loop.main(tmp_path / "whole")
    plain_loop.main(tmp_path, stop=57)
    same(whole, plain_loop.main(tmp_path))
    assert rows_alive(whole[0].weight) == 8


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    import atomic_save

    class Crash:
        def state_dict(self) -> Any:
            raise KeyboardInterrupt

    layer, path = torch.nn.Linear(2, 2), tmp_path / "last.pt"
    atomic_save.save(path, net=layer)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        atomic_save.save(path, net=layer, other=Crash())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_hugging_face_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hf_trainer

    trainer = hf_trainer.main(str(tmp_path / "run"))
    weight = trainer.model.bert.encoder.layer[0].intermediate.dense.weight
    assert rows_alive(weight) == 16
    key = "zeros/bert.encoder.layer.0.intermediate.dense.weight"
    assert f"'{key}': 256" in capsys.readouterr().out
    (tmp_path / "run" / "checkpoint-60").rename(tmp_path / "done")
    same(trainer.model, hf_trainer.main(str(tmp_path / "run"), resume=True).model)


def test_accelerate(tmp_path: Path) -> None:
    import accelerate_loop

    whole = accelerate_loop.main(tmp_path)
    accelerate_loop.main(tmp_path, stop=57)
    same(whole, accelerate_loop.main(tmp_path, first=57))
    assert int((whole[0].weight != 0).sum()) == 64


@few_steps
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*num_workers")
def test_lightning(tmp_path: Path) -> None:
    import lightning
    import lightning_module

    lightning.seed_everything(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    whole = lightning_module.main(tmp_path, **quiet)
    assert rows_alive(whole.lightning_module.net[0].weight) == 8
    assert float(whole.logged_metrics["zeros"]) == 480
    (half,) = tmp_path.glob("*step=40.ckpt")
    same(whole.lightning_module, lightning_module.main(tmp_path / "again", resume=half, **quiet).lightning_module)
