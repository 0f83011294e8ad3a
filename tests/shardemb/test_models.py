"""The built-in models are the published ones, and a user's own is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models import dlrm as torchrec_dlrm

from planner import RequestError
from shardemb.config import RunConfig
from shardemb.data.batch import Batch
from shardemb.models import build_model
from shardemb.models.dcn_v2 import DCNv2
from shardemb.models.dlrm import DLRM
from shardemb.models.mlp import MLP

ROWS = 6


def make_config(**model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"dir": "data", "dense": {"columns": ["I1", "I2"]}},
            "tables": {
                "a": {"num_embeddings": 10, "embedding_dim": 8, "feature_names": ["a", "x"]},
                "b": {"num_embeddings": 20, "embedding_dim": 8, "pooling": "mean"},
            },
            "model": model,
        }
    )


def make_batch(features: tuple[str, ...] = ("a", "x", "b")) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (len(features) * ROWS,), generator=generator)
    return Batch(
        dense=torch.randn(ROWS, 2, generator=generator),
        sparse=KeyedJaggedTensor(
            keys=list(features),
            values=torch.randint(0, 10, (int(lengths.sum()),), generator=generator),
            lengths=lengths,
        ),
        labels=torch.zeros(ROWS),
        mask=torch.ones(ROWS),
        global_rows=ROWS,
    )


def on_cpu(model: torch.nn.Module) -> torch.nn.Module:
    """Tables are made on the meta device: give them memory and values."""
    for module in model.modules():
        if isinstance(module, torch.nn.EmbeddingBag):
            module.to_empty(device="cpu")
            torch.nn.init.normal_(module.weight)
    return model


@pytest.mark.parametrize(
    "model",
    [
        {"name": "dlrm", "args": {"dense_layers": [4], "over_layers": [16, 4]}},
        {"name": "dcn_v2", "args": {"dense_layers": [8], "cross_layers": 2, "low_rank": 3}},
        {"name": "dcn_v2", "args": {"over_layers": []}},
    ],
    ids=["dlrm", "dcn_v2", "dcn_v2 without MLPs"],
)
def test_one_logit_a_row_that_all_inputs_reach(model: dict[str, Any]) -> None:
    """Every table and the dense features get a gradient from the logits."""
    built = on_cpu(build_model(make_config(**model)))
    batch = make_batch()
    batch.dense.requires_grad_()
    logits = built(batch)
    assert logits.shape == (ROWS, 1)
    logits.sum().backward()
    assert batch.dense.grad is not None
    assert batch.dense.grad.abs().sum() > 0
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_dcn_v2_is_torchrecs() -> None:
    """With equal weights and dims it gives the logits of TorchRec's DLRM_DCN, MLPerf's model."""
    tables = [
        EmbeddingBagConfig(name=n, num_embeddings=10, embedding_dim=8, feature_names=[n])
        for n in ("a", "b")
    ]
    embeddings = EmbeddingBagCollection(tables=tables)
    ours = DCNv2(embeddings, 2, dense_layers=[4, 8], cross_layers=2, low_rank=3, over_layers=[6, 5])
    theirs = torchrec_dlrm.DLRM_DCN(
        embeddings,
        dense_in_features=2,
        dense_arch_layer_sizes=[4, 8],
        over_arch_layer_sizes=[6, 5, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=3,
    )
    theirs.inter_arch.crossnet.load_state_dict(ours.cross.state_dict())
    assert_same_outputs(ours, theirs)


def test_dlrm_is_torchrecs() -> None:
    """With equal weights it gives the logits of TorchRec's DLRM."""
    tables = [
        EmbeddingBagConfig(name=n, num_embeddings=10, embedding_dim=8, feature_names=[n])
        for n in ("a", "b")
    ]
    embeddings = EmbeddingBagCollection(tables=tables)
    ours = DLRM(embeddings, 2, dense_layers=[4], over_layers=[6, 5])
    theirs = torchrec_dlrm.DLRM(
        embeddings,
        dense_in_features=2,
        dense_arch_layer_sizes=[4, 8],
        over_arch_layer_sizes=[6, 5, 1],
    )
    assert_same_outputs(ours, theirs)


def assert_same_outputs(ours: DLRM | DCNv2, theirs: torchrec_dlrm.DLRM) -> None:
    """With the weights of our MLPs in TorchRec's."""
    theirs.dense_arch.model.load_state_dict(torchrec_names(ours.dense))
    theirs.over_arch.model[0].load_state_dict(torchrec_names(ours.over))
    theirs.over_arch.model[1].load_state_dict(ours.output.state_dict())
    batch = make_batch(("a", "b"))
    torch.testing.assert_close(ours(batch), theirs(batch.dense, batch.sparse))


def torchrec_names(mlp: MLP) -> dict[str, torch.Tensor]:
    return {
        name.replace("layers", "_mlp").replace("linear", "_linear"): value
        for name, value in mlp.state_dict().items()
    }


@pytest.mark.parametrize("name", ["dlrm", "dcn_v2"])
@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_dropout_and_norms(name: str, norm: str | None) -> None:
    """Dropout draws in training and not in evaluation; the norm is the one asked for."""
    args = {"dropout": 0.5, "norm": norm, "dense_layers": [16], "over_layers": [16]}
    model, batch = on_cpu(build_model(make_config(name=name, args=args))), make_batch()
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    before = model(batch)
    assert torch.equal(before, model(batch))
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("BatchNorm" in kinds, "LayerNorm" in kinds) == (norm == "batch", norm == "layer")


def test_outputs_follow_from_the_losses() -> None:
    """One for each label, for cross-entropy one for each class; a model of one's own is told, if it
    asks."""
    config = make_config(name="dcn_v2")
    classes = {"loss": {"name": "cross_entropy", "num_classes": 5}}
    tasks = {"a": classes, "b": {"labels": ["b", "c"]}}
    config = RunConfig.model_validate({**config.model_dump(), "train": {"tasks": tasks}})
    assert on_cpu(build_model(config))(make_batch()).shape == (ROWS, 7)
    with pytest.raises(RequestError, match=r"model.args.num_outputs: it follows from the losses"):
        build_model(make_config(name="dlrm", args={"num_outputs": 2}))


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`module:callable` is imported from the current folder and called with the config's tables,
    the number of dense features and model.args."""
    (tmp_path / "own_model.py").write_text(
        "import torch\n"
        "class Own(torch.nn.Module):\n"
        "    def __init__(self, embeddings, num_dense, width):\n"
        "        super().__init__()\n"
        "        self.embeddings, self.layer = embeddings, torch.nn.Linear(num_dense, width)\n"
    )
    monkeypatch.chdir(tmp_path)
    model = build_model(make_config(name="own_model:Own", args={"width": 3}))
    assert model.layer.weight.shape == (3, 2)
    assert [t.name for t in model.embeddings.embedding_bag_configs()] == ["a", "b"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "dlrn"}, "choose dlrm or dcn_v2"),
        ({"name": "nowhere:Model"}, "cannot import 'nowhere:Model'"),
        ({"name": "math:Model"}, "cannot import 'math:Model'"),
        ({"name": "dlrm", "args": {"layers": [1]}}, "it takes dense_layers, over_layers"),
    ],
)
def test_wrong_models(model: dict[str, Any], message: str) -> None:
    """The config's key, what was found and what there is to choose from."""
    with pytest.raises(RequestError, match="model.") as caught:
        build_model(make_config(**model))
    assert message in str(caught.value)


def test_dlrm_says_what_it_needs() -> None:
    """Tables of two dims, or no dense columns, are told with the model that takes them."""
    config = make_config(name="dlrm")
    tables = {**config.tables, "b": config.tables["b"].model_copy(update={"embedding_dim": 4})}
    with pytest.raises(RequestError, match=r"tables have \[4, 8\]; use dcn_v2"):
        build_model(config.model_copy(update={"tables": tables}))


def test_dlrm_takes_a_feature_from_one_table() -> None:
    """A feature of two tables is named, with the model that takes it."""
    config = make_config(name="dlrm")
    tables = {**config.tables, "b": config.tables["b"].model_copy(update={"feature_names": ["a"]})}
    with pytest.raises(RequestError, match="several tables use a; use dcn_v2"):
        build_model(config.model_copy(update={"tables": tables}))


@pytest.mark.parametrize(
    "args",
    [
        *({"dense_layers": 8}, {"dense_layers": ["a"]}, {"low_rank": 0}),
        *({"dropout": 1.5}, {"norm": "group"}),
    ],
)
def test_wrong_values_of_model_args(args: dict[str, Any]) -> None:
    """A value that a model cannot be made of is the config's mistake, not a traceback."""
    with pytest.raises(RequestError, match="model.args"):
        build_model(make_config(name="dcn_v2", args=args))


@pytest.mark.parametrize("name", ["type", "keys", "a.b"])
def test_table_names_that_pytorch_does_not_take(name: str) -> None:
    """The remedy keeps the feature's name."""
    config = make_config(name="dcn_v2")
    tables = {name: config.tables["b"]}
    with pytest.raises(RequestError, match=r"feature_names: \["):
        build_model(config.model_copy(update={"tables": tables}))
