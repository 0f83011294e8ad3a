"""YAML in, plain values out: strict about duplicates, `key.sub=value` overrides, name ranges."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from planner.errors import RequestError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_KEY_DOT = re.compile(r"\.(?![^{]*\})")  # not the dots of a range


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, where YAML silently takes the last."""


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise RequestError(
                f"{loader.name}: {key!r} is given twice, on lines {seen[key]} and {line}"
            )
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`; RequestError names the file and line of what is wrong."""
    try:
        with path.open() as file:
            document = yaml.load(file, _StrictLoader)
    except OSError as error:
        raise RequestError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not a text file: {error}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        found = type(document).__name__
        raise RequestError(f"{path} must hold `key: value` lines, found a {found}")
    return document


def apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set `a.b=value` in place; the value is read as YAML."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RequestError(
                f"override {override!r}: write key.sub=value, for example train.batch_size=512"
            )
        *parents, last = _KEY_DOT.split(key)
        target = document
        for depth, parent in enumerate(parents, start=1):
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise RequestError(
                    f"override {override!r}: {'.'.join(parents[:depth])} is {target!r}, "
                    "it has no keys below it"
                )
        try:
            target[last] = yaml.load(text, _StrictLoader)
        except yaml.YAMLError as error:
            raise RequestError(f"override {override!r}: the value is not valid YAML") from error


def expand_names(names: Iterable[str]) -> list[str]:
    """`["C{1..3}", "D"]` -> `["C1", "C2", "C3", "D"]`."""
    expanded: list[str] = []
    for name in names:
        match = _RANGE.search(name)
        if match is None:
            expanded.append(name)
            continue
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise RequestError(f"name range {name!r} is empty: write the smaller number first")
        parts = (f"{name[: match.start()]}{i}{name[match.end() :]}" for i in range(first, last + 1))
        expanded.extend(expand_names(parts))
    return expanded


def expand_keys(mapping: dict[str, Any]) -> dict[str, Any]:
    """Expand range keys; an exact key adds to, and wins over, what its range says."""
    expanded: dict[str, Any] = {}
    ranges_first = sorted(mapping, key=lambda key: _RANGE.search(str(key)) is None)
    for key in ranges_first:
        for name in expand_names([str(key)]):
            value, earlier = mapping[key], expanded.get(name)
            if isinstance(value, dict) and isinstance(earlier, dict):
                value = {**earlier, **value}
            expanded[name] = value
    return expanded
