"""Models: the built-in ones by name, a user's own by import path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_configs import DataType

from planner import RequestError
from shardemb.config import RunConfig
from shardemb.data.schema import BatchSchema
from shardemb.models.dcn_v2 import DCNv2
from shardemb.models.dlrm import DLRM
from shardemb.tasks import num_outputs

BUILT_IN: dict[str, Callable[..., nn.Module]] = {"dlrm": DLRM, "dcn_v2": DCNv2}
_DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


def build_embeddings(config: RunConfig) -> EmbeddingBagCollection:
    """The config's tables, on the meta device: no memory until they are sharded."""
    for name in config.tables:
        if "." in name or hasattr(nn.ModuleDict(), name):
            raise RequestError(
                f"tables.{name}: PyTorch takes no module of this name; give the table another, "
                f"with feature_names: [{name}]"
            )
    return EmbeddingBagCollection(
        device="meta",
        is_weighted=BatchSchema.from_config(config).is_weighted,
        tables=[
            EmbeddingBagConfig(
                name=spec.name,
                num_embeddings=spec.num_embeddings,
                embedding_dim=spec.embedding_dim,
                feature_names=list(spec.feature_names),
                pooling=PoolingType[config.tables[spec.name].pooling.upper()],
                data_type=_DTYPES[spec.dtype],
            )
            for spec in config.table_specs()
        ],
    )


def build_model(config: RunConfig) -> nn.Module:
    """The model that `config.model` names: called with its tables, the number of dense
    features, and `model.args`; with `num_outputs`, what the losses need, if it takes that."""
    name, args = config.model.name, config.model.args
    make = BUILT_IN.get(name) or _import(name)
    embeddings, num_dense = build_embeddings(config), len(config.data.dense.columns)
    parameters = inspect.signature(make).parameters
    if "num_outputs" in parameters:
        if "num_outputs" in args:
            raise RequestError("model.args.num_outputs: it follows from the losses; leave it out")
        args = {**args, "num_outputs": num_outputs(config.tasks)}
    try:
        inspect.signature(make).bind(embeddings, num_dense, **args)
    except TypeError as error:
        known = [key for key in [*parameters][2:] if key != "num_outputs"]
        raise RequestError(
            f"model.args: {name}: {error}; it takes {', '.join(known) or 'none'}"
        ) from error
    if name not in BUILT_IN:
        return make(embeddings, num_dense, **args)
    try:
        return make(embeddings, num_dense, **args)
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        raise RequestError(
            f"model.args: {name} cannot be made of {config.model.args}: {error}"
        ) from error


def _import(path: str) -> Callable[..., nn.Module]:
    module_name, colon, attribute = path.partition(":")
    if not colon:
        raise RequestError(
            f"model.name: {path!r} is no built-in model; choose {' or '.join(BUILT_IN)}, or "
            "package.module:callable for a model of your own"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RequestError(f"model.name: cannot import {path!r}: {error}") from error
