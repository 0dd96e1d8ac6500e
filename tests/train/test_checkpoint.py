"""A checkpoint is complete or not there, and what it restores is what was saved."""

import json
from pathlib import Path

import torch
from torch import nn

from anchorembed.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint


def trained(steps: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        layer(torch.rand(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


def test_restores_weights_and_moments(tmp_path: Path) -> None:
    layer, optimizer = trained(3)
    save_checkpoint(tmp_path, 3, layer, optimizer, keep=2)
    other, fresh = trained(0)
    assert load_checkpoint(tmp_path, other, fresh) == 3
    assert torch.equal(other.weight, layer.weight)
    for key, value in optimizer.state[layer.weight].items():
        assert torch.equal(fresh.state[other.weight][key], value)


def test_only_the_last_are_kept_and_a_damaged_one_is_named(tmp_path: Path, said: list[str]) -> None:
    layer, optimizer = trained(1)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, layer, optimizer, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000003", "step-000002"]
    (tmp_path / "step-000003" / "weights.safetensors").write_bytes(b"\x00" * 20)
    assert load_checkpoint(tmp_path, *trained(0)) == 2
    assert "step-000003: damaged" in said[0]


def test_unusable_newer_ones_do_not_push_out_what_is_written(tmp_path: Path) -> None:
    layer, optimizer = trained(1)
    for step in (7, 8):
        save_checkpoint(tmp_path, step, layer, optimizer, keep=2)
        (tmp_path / f"step-{step:06d}" / "weights.safetensors").write_bytes(b"")
    assert load_checkpoint(tmp_path, *trained(0)) == 0
    save_checkpoint(tmp_path, 1, layer, optimizer, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]


def test_it_says_what_wrote_it(tmp_path: Path, said: list[str]) -> None:
    save_checkpoint(tmp_path, 3, *trained(1), keep=2, plan={"seed": 5})
    path = tmp_path / "step-000003" / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    assert state["plan"] == {"seed": 5}
    assert state["versions"]["torch"] == torch.__version__
    assert load_checkpoint(tmp_path, *trained(0)) == 3
    assert said == []
    state["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(state), encoding="utf-8")
    assert load_checkpoint(tmp_path, *trained(0)) == 3
    assert f"written with torch 1.0, now {torch.__version__}" in said[0]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none", *trained(0)) == 0
