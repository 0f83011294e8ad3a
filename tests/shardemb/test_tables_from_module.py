"""The tables of a Python model, as the planner takes them."""

from __future__ import annotations

import pytest
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
)
from torchrec.modules.embedding_configs import DataType

from planner import PlannerError, RequestError, TableSpec
from shardemb import tables_from_module


def bags(*names: str, weighted: bool = False, **fields: object) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            **{"name": name, "num_embeddings": 10, "embedding_dim": 8, "feature_names": [name]}
            | fields
        )
        for name in names
    ]
    return EmbeddingBagCollection(configs, is_weighted=weighted, device="meta")


def nested() -> nn.Module:
    """Collections of every kind at several depths, beside layers that are none."""
    sequence = EmbeddingConfig(
        name="clicks", num_embeddings=99, embedding_dim=16, feature_names=["last", "saved"]
    )
    tower = nn.Sequential(nn.Linear(2, 2), bags("user", weighted=True, data_type=DataType.FP16))
    return nn.ModuleDict(
        {
            "plain": bags("ad", num_embeddings=7, embedding_dim=4),
            "towers": nn.ModuleList([tower, nn.Identity()]),
            "history": EmbeddingCollection([sequence], device="meta"),
        }
    )


def test_nested_modules() -> None:
    """Every table of every collection, with its dtype, its features and how it is looked up."""
    assert tables_from_module(nested()) == [
        TableSpec(name="ad", num_embeddings=7, embedding_dim=4, feature_names=("ad",)),
        TableSpec(
            name="user", num_embeddings=10, embedding_dim=8, feature_names=("user",),
            dtype="fp16", weighted=True,
        ),
        TableSpec(
            name="clicks", num_embeddings=99, embedding_dim=16, feature_names=("last", "saved"),
            num_features=2, pooled=False,
        ),
    ]  # fmt: skip


def test_a_collection_is_a_model_too() -> None:
    assert [table.name for table in tables_from_module(bags("a", "b"))] == ["a", "b"]


def test_pooling_factors_and_optimizer() -> None:
    """One factor for all, or each feature's own: a table has the mean of its features'."""

    def factors(given: dict[str, float] | float) -> list[float]:
        return [table.pooling_factor for table in tables_from_module(nested(), given)]

    assert factors(2.5) == [2.5, 2.5, 2.5]
    assert factors({"user": 20, "last": 5, "saved": 2}) == [1, 20, 3.5]
    assert factors({"last": 5}) == [1, 1, 3]
    for table in tables_from_module(nested(), optimizer="adagrad"):
        assert table.optimizer == "adagrad"


def test_mistakes_are_named() -> None:
    """Features that no table has, two tables of one name, and models without tables."""
    with pytest.raises(RequestError, match="no table has a feature usr; did you mean user"):
        tables_from_module(nested(), {"usr": 3})
    twice = nn.ModuleDict({"left": bags("a", "b"), "right": nn.Sequential(bags("b"))})
    with pytest.raises(PlannerError, match=r"have a table b \(one at right.0\).*its own name"):
        tables_from_module(twice)
    for model in (nn.Linear(2, 2), nn.EmbeddingBag(5, 4)):
        with pytest.raises(PlannerError, match=f"{type(model).__name__} holds no Embedding"):
            tables_from_module(model)
    with pytest.raises(PlannerError, match="table a: INT8 tables cannot be trained"):
        tables_from_module(bags("a", data_type=DataType.INT8))


def test_one_collection_at_two_places() -> None:
    """A collection that two parts of a model share is one."""
    shared = bags("a")
    assert len(tables_from_module(nn.ModuleDict({"x": shared, "y": shared}))) == 1
