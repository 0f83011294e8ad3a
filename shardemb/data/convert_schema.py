"""The schema that a user declares for the rows of his files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from planner.errors import RequestError
from planner.strict_yaml import read_yaml
from planner.validation import explain
from shardemb.yaml_config import expand_keys, expand_names


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VocabularySchema(_Section):
    """Replace values by their rank: 0 for the most frequent of the training rows."""

    min_count: int = Field(default=1, ge=1, description="rarer values are out of vocabulary")
    max_size: int | None = Field(default=None, ge=1, description="keep so many values at most")
    oov_rows: int = Field(
        default=1, ge=1, description="rows after the vocabulary that the other values hash into"
    )


class SparseSchema(_Section):
    """One sparse feature."""

    kind: Literal["int", "string"] = "int"
    list: bool = Field(default=False, description="a row has any number of values")
    weights: str | None = Field(default=None, description="column of weights, one for each value")
    vocabulary: VocabularySchema | None = Field(
        default=None, description="default: the values themselves are kept"
    )


class ConvertSchema(_Section):
    """What the columns of CSV, TSV or JSON-lines files mean; other columns are left out."""

    label: str = "label"
    dense: list[str] = Field(default_factory=list, description="names; I{1..13} is a range")
    sparse: dict[str, SparseSchema] = Field(min_length=1)
    columns: list[str] | None = Field(
        default=None, description="names of all columns, for files without a header line"
    )
    delimiter: str | None = Field(
        default=None, min_length=1, max_length=1, description="default: comma in csv, tab in tsv"
    )
    separator: str = Field(default="|", min_length=1, description="between the values of a list")
    null_values: list[str] = Field(default=[""], description="text that stands for nothing")

    @field_validator("sparse", mode="before")
    @classmethod
    def _expand_keys(cls, sparse: Any) -> Any:
        if not isinstance(sparse, dict):
            return sparse
        return expand_keys({name: value or {} for name, value in sparse.items()})

    @field_validator("dense", "columns")
    @classmethod
    def _expand_names(cls, names: list[str] | None) -> list[str] | None:
        return None if names is None else expand_names(names)

    @field_validator("delimiter")
    @classmethod
    def _separates(cls, delimiter: str | None) -> str | None:
        if delimiter is not None and (delimiter in '"\r\n' or not delimiter.isascii()):
            raise ValueError("a delimiter is one ASCII character, no quote and no line end")
        return delimiter

    @model_validator(mode="after")
    def _each_once(self) -> ConvertSchema:
        weights = [feature.weights for feature in self.sparse.values() if feature.weights]
        for where, names in (
            ("label, dense, sparse and weights", [self.label, *self.dense, *self.sparse, *weights]),
            ("columns", self.columns or []),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{where}: {', '.join(twice)} is named twice")
        return self


def load_schema(path: Path) -> ConvertSchema:
    """RequestError lists every wrong key by its full path."""
    document = read_yaml(path, "schema")
    try:
        return ConvertSchema.model_validate(document)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain(error, ConvertSchema))
        raise RequestError(f"{path} is not a valid schema:\n{lines}") from error
