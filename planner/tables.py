"""What the planner knows of an embedding table."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DataType = Literal["fp32", "fp16", "bf16"]
TableOptimizerName = Literal["sgd", "adagrad", "rowwise_adagrad"]

BYTES_PER_ELEMENT: dict[DataType, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


class TableSpec(BaseModel):
    """One embedding table of `num_embeddings` rows by `embedding_dim` columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    num_embeddings: int = Field(gt=0)
    embedding_dim: int = Field(gt=0)
    feature_names: tuple[str, ...] = Field(default=(), description="features that look it up")
    pooling_factor: float = Field(default=1.0, ge=0, description="mean ids per feature and row")
    dtype: DataType = "fp32"
    optimizer: TableOptimizerName = "rowwise_adagrad"

    @property
    def num_features(self) -> int:
        """Features that look it up; a table that names none has one."""
        return max(len(self.feature_names), 1)
