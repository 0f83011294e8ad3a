"""The embedding tables that a model holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from planner import PlannerError, RequestError, TableSpec
from planner.tables import TableOptimizerName
from planner.validation import nearest

_DTYPES = {DataType.FP32: "fp32", DataType.FP16: "fp16", DataType.BF16: "bf16"}


class HeldTable(NamedTuple):
    """A table, the module that holds it and that module's path in the model."""

    path: str
    module: EmbeddingBagCollection | EmbeddingCollection
    config: BaseEmbeddingConfig
    parameter: nn.Parameter


def held_tables(model: nn.Module) -> Iterator[HeldTable]:
    """Every table of every embedding collection in `model`."""
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                yield HeldTable(path, module, config, module.embedding_bags[config.name].weight)
        elif isinstance(module, EmbeddingCollection):
            for config in module.embedding_configs():
                yield HeldTable(path, module, config, module.embeddings[config.name].weight)


def tables_from_module(
    model: nn.Module,
    pooling_factors: Mapping[str, float] | float = 1.0,
    optimizer: TableOptimizerName = "rowwise_adagrad",
) -> list[TableSpec]:
    """The tables of every EmbeddingBagCollection and EmbeddingCollection in `model`.

    `pooling_factors` are the mean ids per row, of each feature by its name (1 where it has none)
    or of all: they tell a cost model how much is looked up. PlannerError where there is nothing to
    plan for, or where two tables have one name; RequestError for factors of unknown features.
    """
    held = list(held_tables(model))
    if not held:
        raise PlannerError(
            f"{type(model).__name__} holds no EmbeddingBagCollection: there is nothing to shard"
        )
    _check_features(pooling_factors, held)
    specs: dict[str, TableSpec] = {}
    for path, module, config, _ in held:
        if config.name in specs:
            raise PlannerError(
                f"two embedding collections have a table {config.name} (one at {path}): "
                "a plan names tables, so give each its own name"
            )
        if config.data_type not in _DTYPES:
            raise PlannerError(f"table {config.name}: {config.data_type} tables cannot be trained")
        specs[config.name] = TableSpec(
            name=config.name,
            num_embeddings=config.num_embeddings,
            embedding_dim=config.embedding_dim,
            feature_names=tuple(config.feature_names),
            pooling_factor=_pooling_factor(config.feature_names, pooling_factors),
            dtype=_DTYPES[config.data_type],
            weighted=isinstance(module, EmbeddingBagCollection) and module.is_weighted(),
            pooled=isinstance(module, EmbeddingBagCollection),
            optimizer=optimizer,
        )
    return list(specs.values())


def _check_features(factors: Mapping[str, float] | float, held: Iterable[HeldTable]) -> None:
    if not isinstance(factors, Mapping):
        return
    known = {name for table in held for name in table.config.feature_names}
    unknown = [name for name in factors if name not in known]
    if unknown:
        raise RequestError(
            f"pooling_factors: no table has a feature {unknown[0]}{nearest(unknown[0], known)}"
        )


def _pooling_factor(features: Sequence[str], factors: Mapping[str, float] | float) -> float:
    """The mean over the table's features."""
    if not isinstance(factors, Mapping):
        return factors
    values = [factors.get(name, 1.0) for name in features] or [1.0]
    return sum(values) / len(values)
