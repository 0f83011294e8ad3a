"""Trains recommender models with sharded embedding tables.

Public names are imported at first use, so that reading a config does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Batch": "shardemb.data.batch",
    "BatchSchema": "shardemb.data.schema",
    "Checkpoints": "shardemb.checkpoint.checkpoints",
    "CommunicationConfig": "shardemb.precision_config",
    "DenseOptimizerConfig": "shardemb.optimizer_config",
    "FeatureSchema": "shardemb.data.schema",
    "FreezeConfig": "shardemb.optimizer_config",
    "GradientClippingConfig": "shardemb.optimizer_config",
    "ParquetReader": "shardemb.data.parquet",
    "PrecisionConfig": "shardemb.precision_config",
    "RunConfig": "shardemb.config",
    "ScheduleConfig": "shardemb.optimizer_config",
    "ShardedModel": "shardemb.sharding.shard_model",
    "TableOptimizerConfig": "shardemb.optimizer_config",
    "Trainer": "shardemb.trainer",
    "current_topology": "shardemb.sharding.shard_model",
    "load_config": "shardemb.config",
    "plan_from_torchrec": "shardemb.sharding.torchrec_plan",
    "process_group": "shardemb.ranks",
    "shard_model": "shardemb.sharding.shard_model",
    "tables_from_module": "shardemb.sharding.tables",
    "to_torchrec": "shardemb.sharding.torchrec_plan",
    "torchrec_from_json": "shardemb.sharding.torchrec_plan",
    "torchrec_to_json": "shardemb.sharding.torchrec_plan",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'shardemb' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
