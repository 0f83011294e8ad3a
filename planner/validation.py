"""What pydantic found wrong with a document, told by the keys its user wrote."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each mistake: the key's full path in a document of `model`, and the reason."""
    return [_explain(mistake, model) for mistake in error.errors()]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or the choices where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"


def shorten(value: object) -> str:
    """`value` as Python writes it, cut to what fits a line."""
    shown = repr(value)
    return shown if len(shown) < 80 else shown[:77] + "..."


def _explain(mistake: Any, model: type[BaseModel]) -> str:
    location = tuple(mistake["loc"])
    path = ".".join(str(part) for part in location)
    if mistake["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        return f"{path}: unknown key{nearest(str(location[-1]), known)}"
    if mistake["type"] == "missing":
        return f"{path}: required, but not given"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    return f"{path}: {message} (found {shorten(mistake['input'])})" if path else message


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `location` takes."""
    annotation: Any = model
    for part in location:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = annotation.model_fields[part].annotation
        while get_origin(annotation) in (Annotated, Union, types.UnionType):
            annotation = get_args(annotation)[0]
    return list(annotation.model_fields)
