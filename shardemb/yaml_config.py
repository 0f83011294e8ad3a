"""What a run config adds to YAML: `key.sub=value` overrides and name ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

from planner.errors import RequestError
from planner.strict_yaml import StrictLoader

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set `a.b=value` in place; the value is read as YAML.

    A name range sets the key of each name, which wins over any range of the document.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RequestError(
                f"override {override!r}: write key.sub=value, for example train.batch_size=512"
            )
        try:
            for name in expand_names([key]):
                _set(document, name.split("."), yaml.load(text, StrictLoader))
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or "it has unprintable characters"
            raise RequestError(
                f"override {override!r}: the value is not valid YAML: {reason}"
            ) from error
        except ValueError as error:
            raise RequestError(f"override {override!r}: {error}") from error


def _set(document: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for depth, parent in enumerate(parents, start=1):
        below = document.get(parent)
        if not isinstance(below, dict | None):
            raise ValueError(
                f"{'.'.join(parents[:depth])} is {below!r}, it has no keys below it: set all of it"
            )
        document[parent] = dict(below or {})  # a copy: a YAML alias may be it elsewhere
        document = document[parent]
    document[last] = value


def expand_names(names: Iterable[str]) -> list[str]:
    """`["C{1..3}", "D"]` -> `["C1", "C2", "C3", "D"]`; `{01..12}` keeps its zeros."""
    expanded: list[str] = []
    for name in names:
        match = _RANGE.search(name)
        if match is None:
            expanded.append(name)
            continue
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise ValueError(f"name range {name!r} is empty: write the smaller number first")
        before, after, width = name[: match.start()], name[match.end() :], len(match[1])
        parts = (f"{before}{i:0{width}}{after}" for i in range(first, last + 1))
        expanded.extend(expand_names(parts))
    return expanded


def expand_keys(mapping: dict[str, Any]) -> dict[str, Any]:
    """Expand range keys; fields of a later range win, and those of an exact key over all."""
    expanded: dict[str, Any] = {}
    ranges_first = sorted(mapping, key=lambda key: _RANGE.search(str(key)) is None)
    for key in ranges_first:
        for name in expand_names([str(key)]):
            value, earlier = mapping[key], expanded.get(name)
            if isinstance(value, dict) and isinstance(earlier, dict):
                value = {**earlier, **value}
            expanded[name] = value
    return expanded
