"""Learning rates over the steps of a run."""

from __future__ import annotations

import math

from torchrec.optim import CombinedOptimizer

from shardemb.optimizer_config import ScheduleConfig
from shardemb.sharding.shard_model import ShardedModel


def factor(config: ScheduleConfig, step: int, last_step: int) -> float:
    """What the learning rates are multiplied by in `step`, which counts from 1.

    A function of the step alone, so that a run that goes on from a checkpoint has the same. The
    warm-up is linear from 1 / warmup_steps; with `polynomial` of power 2 after it this is MLPerf's
    for DLRM (LRPolicyScheduler).
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    start = config.decay_start_step if config.decay_start_step is not None else config.warmup_steps
    if config.name == "constant" or step <= start:
        return 1.0
    length = config.decay_steps or max(last_step - start, 1)
    if config.name == "step":
        return config.gamma ** ((step - start) // length)
    left = max(1 - (step - start) / length, 0.0)
    if config.name == "cosine":
        shape = (1 - math.cos(math.pi * left)) / 2
    else:
        shape = left**config.power
    return config.final + (1 - config.final) * shape


class LearningRates:
    """Drives the optimizers of tables, inside backward and after it, and of dense parameters."""

    def __init__(
        self, model: ShardedModel, optimizer: CombinedOptimizer, config: ScheduleConfig
    ) -> None:
        self._config, self._model = config, model
        self._groups = [
            group for part in (optimizer, model.fused_optimizer) for group in part.param_groups
        ]
        self._first = [group["lr"] for group in self._groups]
        self._rules = [updates.rule for updates in model.own_updates]
        self._of_rules = [rule.lr for rule in self._rules]
        self._factor = 1.0

    def set(self, step: int, last_step: int) -> None:
        """Those of `step`, before its backward."""
        now = factor(self._config, step, last_step)
        if now == self._factor:
            return
        self._factor = now
        for group, first in zip(self._groups, self._first, strict=True):
            group["lr"] = first * now
        self._model.fused_optimizer.step()  # has FBGEMM's kernels know; it updates nothing
        for rule, first in zip(self._rules, self._of_rules, strict=True):
            rule.lr = first * now
