"""Which step had the best evaluation, and when waiting for a better one has been long enough."""

from __future__ import annotations

import math
from typing import Any, Literal


class BestStep:
    """By `metric`, of which `best` is the better end; a value is better if it is by more than
    `min_delta`. After `patience` values without a better one training is to stop."""

    def __init__(
        self,
        metric: str,
        best: Literal["max", "min"],
        patience: int | None = None,
        min_delta: float = 0.0,
    ) -> None:
        self.metric, self._sign = metric, 1 if best == "max" else -1
        self._patience, self._min_delta = patience, min_delta
        self.step: int | None = None
        self.value: float | None = None
        self._waited = 0  # evaluations since

    def add(self, step: int, value: float) -> bool:
        """Whether `value`, of the metric after `step`, is the best so far; NaN never is."""
        gain = math.inf if self.value is None else self._sign * (value - self.value)
        if math.isnan(value) or gain <= self._min_delta:
            self._waited += 1
            return False
        self.step, self.value, self._waited = step, value, 0
        return True

    @property
    def should_stop(self) -> bool:
        return self._patience is not None and self._waited >= self._patience

    def state(self) -> dict[str, Any]:
        """What `resume` needs, as plain JSON."""
        return {
            "metric": self.metric,
            "step": self.step,
            "value": self.value,
            "waited": self._waited,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; anew where that was by another metric."""
        if state["metric"] == self.metric:
            self.step, self.value, self._waited = state["step"], state["value"], state["waited"]
