"""YAML in, plain values out: strict about duplicates, kind to numbers as people write them."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from planner.errors import RequestError

_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_MOST_NESTED = 100  # the loader in C would crash the process where the stack ends


class _Shallow:
    """Refuses what is nested too deeply; a loader calls these around each node."""

    _depth = 0

    def descend_resolver(self, parent: yaml.Node | None, index: Any) -> None:
        self._depth += 1
        if self._depth > _MOST_NESTED:
            mark = parent.start_mark if parent else None
            raise ComposerError(None, None, f"nested more than {_MOST_NESTED} deep", mark)

    def ascend_resolver(self) -> None:
        self._depth -= 1


class StrictLoader(_Shallow, yaml.SafeLoader):
    """A SafeLoader whose keys are text as written (`1`, `no`), each given once; 1e-3 is a number.

    YAML would take the last of equal keys, read `no` as false and 1e-3 as text.
    """


class _FastLoader(_Shallow, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same in C where PyYAML was built with it: five times as fast, with terser messages."""


def _construct_mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        mark, key = key_node.start_mark, key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConstructorError(None, None, "a key must be plain text", mark)
        if key in seen:
            problem = f"{key!r} is given twice, on lines {seen[key]} and {mark.line + 1}"
            raise ConstructorError(None, None, problem, mark)
        seen[key] = mark.line + 1
        key_node.tag = yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG
    return loader.construct_mapping(node, deep=True)


for _loader in (StrictLoader, _FastLoader):
    _loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
    _loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(path: Path, what: str = "config") -> dict[str, Any]:
    """The mapping in `path`; RequestError names the file and line of what is wrong."""
    try:
        document = _load(path)
    except OSError as error:
        raise RequestError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not a text file: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise RequestError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        found = type(document).__name__
        raise RequestError(f"{path} must hold `key: value` lines, found a {found}")
    return document


def _load(path: Path) -> Any:
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _FastLoader)
    except (yaml.YAMLError, ValueError):
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, StrictLoader)  # for its message, which quotes the line
