"""What the planner knows of an embedding table."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DataType = Literal["fp32", "fp16", "bf16"]
TableOptimizerName = Literal[
    "sgd",
    "adagrad",
    "rowwise_adagrad",
    "adam",
    "partial_rowwise_adam",
    "lamb",
    "partial_rowwise_lamb",
]

BYTES_PER_ELEMENT: dict[DataType, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

# Bin 0: rows looked up once in a batch of REUSE_BATCH_SIZE rows; bin i: (2^(i-1), 2^i] times;
# the last bin is open. The bins of DreamShard (Zha et al., NeurIPS 2022).
REUSE_BINS = 17
REUSE_BATCH_SIZE = 65_536


class TableSpec(BaseModel):
    """One embedding table of `num_embeddings` rows by `embedding_dim` columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    num_embeddings: int = Field(gt=0, le=2**40)
    embedding_dim: int = Field(gt=0, le=2**16)
    feature_names: tuple[str, ...] = Field(default=(), description="features that look it up")
    num_features: int = Field(default=1, gt=0, description="how many features look it up")
    pooling_factor: float = Field(default=1.0, ge=0, description="mean ids per feature and row")
    dtype: DataType = "fp32"
    weighted: bool = Field(default=False, description="each id has a weight")
    pooled: bool = Field(default=True, description="false: one embedding per id, not per bag")
    optimizer: TableOptimizerName = "rowwise_adagrad"
    reuse_histogram: tuple[float, ...] | None = Field(
        default=None,
        description="share of the lookups in a batch of 65,536 that go to rows looked up 1, 2, "
        "3-4, 5-8, ... times in it; 17 shares",
    )

    @model_validator(mode="before")
    @classmethod
    def _count_features(cls, values: Any) -> Any:
        names = values.get("feature_names") if isinstance(values, dict) else None
        if not names or not isinstance(names, (list, tuple)):
            return values
        named = len(names)
        if values.get("num_features", named) != named:
            raise ValueError(
                f"num_features is {values['num_features']}, but feature_names has {named}"
            )
        return {**values, "num_features": named}

    @field_validator("reuse_histogram")
    @classmethod
    def _is_a_distribution(cls, shares: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if shares is None:
            return None
        if len(shares) != REUSE_BINS:
            raise ValueError(f"there must be {REUSE_BINS} shares, not {len(shares)}")
        if min(shares) < 0 or abs(sum(shares) - 1) > 0.01:
            raise ValueError(f"the shares must be >= 0 and sum to 1, they sum to {sum(shares):g}")
        return shares

    @property
    def bytes_per_element(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]
