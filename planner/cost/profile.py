"""A profile: one machine's fitted costs, as one JSON file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, model_validator

from planner.cost.communication import CollectiveTimes
from planner.cost.features import FEATURES, ShardWork, sum_by
from planner.cost.measurements import Collective, Environment
from planner.cost.networks import DreamShardNetwork, Ensemble, Part, Vector
from planner.cost.plan_times import PlanTimes
from planner.cost.stages import STAGES
from planner.errors import RequestError
from planner.files import write_whole
from planner.search.policy import PlacementPolicy
from planner.shards import Floats, Ints
from planner.validation import explain

VERSION: Literal[1] = 1
COVERAGE = 0.9  # of the intervals
ROUNDING = 1e-4  # of the measured range, in its logarithms: a file has seven digits


class Estimate(NamedTuple):
    """Milliseconds, and the interval that holds COVERAGE of what is measured."""

    ms: Floats
    low: Floats
    high: Floats


class ComputeTimes(Part):
    """Of FBGEMM's fused kernels, pooled and unweighted, in device memory."""

    network: Ensemble
    margins: tuple[float, float] = Field(
        description="half of the intervals of forward and backward, in logarithms"
    )
    lowest: Vector = Field(description="[features]: the range that was measured")
    highest: Vector = Field(description="[features]")
    measured: int = Field(gt=0, description="how many sets of tables")

    @model_validator(mode="after")
    def _fits(self) -> ComputeTimes:
        sizes = {len(member.mean) for member in self.network.members}
        if sizes | {len(self.lowest), len(self.highest)} != {len(FEATURES)}:
            raise ValueError(f"must be of the {len(FEATURES)} features of this version")
        return self

    def estimate(self, work: ShardWork, owner: Ints, devices: int) -> Estimate:
        """[devices, 2]: forward and backward; `owner` [shards] is the device of each."""
        ms = self.stage_ms(sum_by(self.network.represent(work.features), owner, devices))
        factor = np.exp(self.margins)
        return Estimate(ms, ms / factor, ms * factor)

    def stage_ms(self, sums: Floats) -> Floats:
        """[devices, 2], from what the network represents shards by, summed; a device without
        shards runs no kernel."""
        is_used = sums.max(axis=1, keepdims=True) > 0
        return np.where(is_used, self.network.stage_ms(sums), 0.0)

    def extrapolated(self, work: ShardWork) -> Floats:
        """[shards]: how many times beyond the measured range a shard is, in its worst feature; 1
        where it is within."""
        features = work.features
        beyond = np.maximum(self.lowest - features, features - self.highest) - ROUNDING
        return np.asarray(np.exp(np.maximum(beyond, 0).max(axis=1, initial=0.0)))


class Profile(Part):
    """What `shardemb profile` has found; `--cost profile.json` plans with it."""

    version: Literal[1] = VERSION
    environment: Environment
    seed: int
    compute: ComputeTimes
    communication: dict[Collective, CollectiveTimes] = Field(
        description="empty where one process measured alone"
    )
    plans: tuple[PlanTimes, ...] = Field(
        default=(), description="for each number of ranks that whole plans were run on"
    )
    dreamshard: DreamShardNetwork
    policy: PlacementPolicy | None = Field(
        default=None, description="where one was trained: --search dreamshard places by it"
    )

    def save(self, path: Path) -> None:
        """Write `path` whole or not at all."""
        write_whole(path, self.model_dump_json(exclude_none=True) + "\n", "profile")

    def summary(self) -> dict[str, Any]:
        """What was measured, and how far off predictions are: 9 of 10 are nearer."""
        forward, backward = self.compute.margins
        fitted: dict[str, tuple[int, float]] = {
            "forward_compute": (self.compute.measured, forward),
            "backward_compute": (self.compute.measured, backward),
            **{kind: (times.measured, times.margin) for kind, times in self.communication.items()},
            **{
                f"{stage.removesuffix('_ms')} of {times.world_size} ranks": (times.measured, margin)
                for times in self.plans
                for stage, margin in zip(STAGES, times.margins, strict=True)
            },
        }
        return {
            "device": self.environment.described,
            "date": self.environment.date,
            "fitted": {
                what: {"measured": count, "margin_percent": 100 * (math.exp(margin) - 1)}
                for what, (count, margin) in fitted.items()
            },
        }

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile; RequestError names the file and the wrong key."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read the profile {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not a profile: {error}") from error
        if not isinstance(document, dict):
            raise RequestError(f"{path} is not a profile: it holds no object")
        if document.get("version") != VERSION:
            raise RequestError(
                f"{path} is a profile of version {document.get('version')!r}; this shardemb reads "
                f"version {VERSION}: run `shardemb profile` anew, which fits what it has measured"
            )
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            lines = "\n".join(f"  {line}" for line in explain(error, cls)[:5])
            raise RequestError(f"{path} is not a profile:\n{lines}") from error
