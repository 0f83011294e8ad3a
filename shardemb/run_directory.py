"""The run directory: config.yaml, plan.json, metrics.jsonl, tensorboard/, result.json."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from planner import Plan, RequestError, UserError
from shardemb.config import RunConfig


class RunDirectory:
    """Creates `config.output` for a new run; an earlier run there is kept beside it."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self.path = config.output
        try:
            self.kept = _set_aside(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(config.to_yaml())
            plan.save(self.path / "plan.json")
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error

    def write_result(self, result: dict[str, Any]) -> None:
        """result.json, whole or not at all; a metric that is undefined is null in it."""
        target = self.path / "result.json"
        partial = target.with_name("result.json.partial")
        try:
            partial.write_text(json.dumps(without_nan(result), indent=2) + "\n")
            os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(_cannot_write(self.path, error)) from error


def without_nan(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _set_aside(path: Path) -> Path | None:
    """Rename an earlier run `NAME` to the first free `NAME.1`, `NAME.2` ..."""
    if not path.is_dir() or not any(path.iterdir()):
        return None
    if not (path / "config.yaml").exists():
        raise RequestError(
            f"output: {path} is not empty and not a run directory; choose another with output=DIR"
        )
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.rename(path.with_name(f"{path.name}.{number}"))


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write the run directory {path}: {error.strerror}; free space there or choose "
        "another with output=DIR"
    )
