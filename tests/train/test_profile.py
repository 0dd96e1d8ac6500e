"""How the machine's peak is measured; `tests/test_cli.py` runs the whole profile."""

import pytest
import torch

from anchorembed.train import profile


@pytest.mark.parametrize(
    ("rates", "sizes"), [((1e9,), [1024]), ((9e11, 8e10), [1024, 2048]), ((1e15,) * 3, [1024, 2048, 4096])]
)
def test_a_slow_product_is_not_followed_by_a_larger_one(
    rates: tuple[float, ...], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, given = [], iter(rates)

    def product_rate(rows: int, *_: object) -> float:
        measured.append(rows)
        return next(given)

    monkeypatch.setattr(profile, "product_rate", product_rate)
    assert profile.matmul_peak(torch.float32, torch.device("cpu")) == max(rates)
    assert measured == sizes


def test_work_on_the_cpu_is_measured_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    times: dict[str, float] = {}
    with profile._profiled(times, torch.device("cpu")):
        torch.ones(64, 64) @ torch.ones(64, 64)
    assert sum(times.values()) == pytest.approx(1)
