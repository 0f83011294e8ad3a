"""The embedding tables that a model holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType

from planner import PlannerError, TableSpec
from planner.tables import TableOptimizerName

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
    model: nn.Module, optimizer: TableOptimizerName = "rowwise_adagrad"
) -> list[TableSpec]:
    """The tables of `model`, as the planner knows them."""
    held = list(held_tables(model))
    if not held:
        raise PlannerError(
            f"{type(model).__name__} holds no EmbeddingBagCollection: there is nothing to shard"
        )
    specs: dict[str, TableSpec] = {}
    for path, _, config, _ in held:
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
            dtype=_DTYPES[config.data_type],
            optimizer=optimizer,
        )
    return list(specs.values())
