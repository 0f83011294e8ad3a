"""Schedules are functions of the step."""

from __future__ import annotations

import pytest
import torch

from shardemb.optimizer_config import ScheduleConfig
from shardemb.schedule import factor


def factors(last: int = 20, **config: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(config)
    return [factor(schedule, step, last) for step in range(1, last + 1)]


def test_constant_after_a_warm_up() -> None:
    assert factors() == [1.0] * 20
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_mlperf() -> None:
    """Warm-up, full rates, then the square of what is left of the decay; nothing after it."""
    found = factors(name="polynomial", warmup_steps=4, decay_start_step=8, decay_steps=10)
    assert found[:8] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert found[8:] == pytest.approx([((18 - s) / 10) ** 2 if s < 18 else 0 for s in range(9, 21)])


def test_polynomial_to_the_end_is_pytorchs() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=3.0)
    expected = []
    for _ in range(20):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert factors(name="polynomial", power=3.0) == pytest.approx(expected, abs=1e-9)


def test_cosine_to_the_end_is_pytorchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    expected = []
    for _ in range(20):
        optimizer.step()
        theirs.step()
        expected.append(theirs.get_last_lr()[0])
    assert factors(name="cosine", final=0.1) == pytest.approx(expected)


def test_steps() -> None:
    found = factors(8, name="step", decay_steps=3, gamma=0.5, warmup_steps=1)
    assert found == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "step"}, "decay_steps: `step` needs"),
        ({"warmup_steps": 5, "decay_start_step": 3}, "decay_start_step: 3 is within the warm-up"),
    ],
)
def test_mistakes(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig.model_validate(config)
