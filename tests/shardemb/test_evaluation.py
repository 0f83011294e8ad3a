from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchrec import KeyedJaggedTensor

from shardemb.data.batch import Batch
from shardemb.metrics.catalog import metrics_of
from shardemb.metrics.evaluation import Evaluation, Evaluator
from shardemb.tasks import Task


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _batch(labels: list[float], padding: int = 0) -> Batch:
    size = len(labels) + padding
    return Batch(
        dense=torch.zeros(size, 0),
        sparse=KeyedJaggedTensor(["c"], torch.zeros(0, dtype=torch.int64), torch.zeros(size)),
        labels=torch.tensor([*labels, *[0.0] * padding]),
        mask=torch.tensor([1.0] * len(labels) + [0.0] * padding),
        global_rows=len(labels),
    )


def _evaluate(*batches: tuple[list[float], list[float]], padding: int = 0) -> Evaluation:
    evaluator = Evaluator(torch.device("cpu"))
    for logits, labels in batches:
        padded = torch.tensor([*logits, *[99.0] * padding])
        evaluator.update(padded, _batch(labels, padding))
    return evaluator.compute()


def _pair_auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the right order; a tie counts half."""
    differences = logits[labels == 1][:, None] - logits[labels == 0][None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_auc_is_the_share_of_ordered_pairs(seed: int, values: int):
    """Brute force over all pairs, with few distinct logits (mostly ties) and with many, in
    batches of uneven size."""
    random = np.random.default_rng(seed)
    logits = random.integers(0, values, 300).astype(np.float32) / values * 8 - 4
    labels = (random.random(300) < 0.3).astype(np.float32)
    parts = zip(np.split(logits, [7, 150]), np.split(labels, [7, 150]), strict=True)
    found = _evaluate(*[(x.tolist(), y.tolist()) for x, y in parts])
    assert found.metrics["auc"] == pytest.approx(_pair_auc(logits, labels), abs=1e-6)
    assert found.samples == 300


def test_log_loss_and_normalized_entropy_by_hand():
    """Logits of probabilities 1/2, 3/4 and 1/4 for labels 1, 1 and 0: the loss is
    (log 2 + 2 log 4/3) / 3, its normalizer the entropy of 2/3."""
    found = _evaluate(([0.0, math.log(3), -math.log(3)], [1.0, 1.0, 0.0]))
    loss = (math.log(2) + 2 * math.log(4 / 3)) / 3
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found.metrics["auc"] == 1.0
    assert found.metrics["logloss"] == pytest.approx(loss, rel=1e-6)
    assert found.metrics["normalized_entropy"] == pytest.approx(loss / entropy, rel=1e-6)


def test_the_base_rate_has_a_normalized_entropy_of_one():
    """A model that knows the click rate and nothing else scores 1, with an AUC of one half."""
    logit = math.log(0.25 / 0.75)
    found = _evaluate(([logit] * 8, [1.0, 1.0] + [0.0] * 6))
    assert found.metrics["normalized_entropy"] == pytest.approx(1, rel=1e-6)
    assert found.metrics["auc"] == 0.5


def test_padding_has_no_part():
    """Rows with mask 0 change nothing, whatever the model says of them; a batch may be all
    padding."""
    batches = [([0.5, -1.0, 2.0], [1.0, 0.0, 0.0]), ([], []), ([0.1], [1.0])]
    assert _evaluate(*batches, padding=5) == _evaluate(*batches)
    assert _evaluate(*batches, padding=5).samples == 4


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_auc(label: float):
    """Without a pair there is nothing to order, and the entropy is 0: NaN, but a log loss."""
    found = _evaluate(([0.0, 0.0], [label, label]))
    assert math.isnan(found.metrics["auc"]) and math.isnan(found.metrics["normalized_entropy"])
    assert found.metrics["logloss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("batches", [[], [([], [])]])
def test_no_rows_have_no_metrics(batches: list[tuple[list[float], list[float]]]):
    """No batch, or only padding: zero samples, and NaN for the rest."""
    found = _evaluate(*batches, padding=3)
    assert found.samples == 0
    assert all(map(math.isnan, found.metrics.values()))


def test_a_model_that_diverged_has_no_auc():
    """NaN logits have no order: the metrics are NaN, not a number that looks like a score."""
    found = _evaluate(([math.nan, 0.5, -0.5], [1.0, 1.0, 0.0]))
    assert all(map(math.isnan, found.metrics.values()))
    assert found.samples == 3


def test_certain_predictions_keep_a_finite_loss():
    """A logit of 200 for a negative costs 200, where a probability rounded to 1 would cost
    infinity."""
    found = _evaluate(([200.0, -200.0], [0.0, 1.0]))
    assert found.metrics["logloss"] == pytest.approx(200) and found.metrics["auc"] == 0.0


def test_the_last_rows_of_large_data_count():
    """A sum of 2**25 in float32 would not see one more: here every row moves the mean."""
    evaluator = Evaluator(torch.device("cpu"))
    evaluator.update(torch.tensor([float(1 << 25)]), _batch([0.0]))
    for _ in range(8):
        evaluator.update(torch.tensor([1.0]), _batch([0.0]))
    expected = ((1 << 25) + 8 * math.log1p(math.e)) / 9
    assert evaluator.compute().metrics["logloss"] == pytest.approx(expected, rel=1e-9)


# --- Other losses, against NumPy


def _evaluate_tasks(
    tasks: tuple[Task, ...], outputs: np.ndarray, labels: np.ndarray, names: tuple[str, ...]
) -> dict[str, float]:
    """`outputs` and `labels` [rows, columns], in three batches with padding."""
    evaluator = Evaluator(torch.device("cpu"), tasks, metrics_of(tasks, names))
    for rows in np.array_split(np.arange(len(labels)), 3):
        padded = [np.pad(values[rows], ((0, 2), (0, 0))) for values in (outputs, labels)]
        batch = _batch([0.0] * len(rows), padding=2)
        batch.labels = torch.from_numpy(padded[1]).float()
        evaluator.update(torch.from_numpy(padded[0]).float(), batch)
    return evaluator.compute().metrics


def test_metrics_of_classes():
    """Mean negative log of the true class's softmax, and how often it is the largest."""
    random = np.random.default_rng(0)
    outputs, labels = random.normal(size=(100, 4)), random.integers(0, 4, (100, 1))
    task = Task("genre", "cross_entropy", ("genre",), num_classes=4)
    found = _evaluate_tasks((task,), outputs, labels, ())
    shares = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    right = (outputs.argmax(axis=1) == labels[:, 0]).mean()
    expected = -np.log(shares[np.arange(100), labels[:, 0]]).mean()
    assert found == pytest.approx({"logloss": expected, "accuracy": right}, rel=1e-5)


def test_metrics_of_numbers():
    """Squared and absolute errors, and the ratio of the means, of two columns: their means."""
    random = np.random.default_rng(0)
    outputs, labels = random.normal(size=(90, 2)) + 3, random.normal(size=(90, 2)) + 2
    task = Task("stars", "mse", ("a", "b"))
    found = _evaluate_tasks((task,), outputs, labels, ("mse", "mae", "calibration"))
    ratio = (outputs.mean(axis=0) / labels.mean(axis=0)).mean()
    errors = outputs - labels
    expected = {"mse": (errors**2).mean(), "mae": np.abs(errors).mean(), "calibration": ratio}
    assert found == pytest.approx(expected, rel=1e-5)


def test_metrics_of_several_tasks():
    """Each has its own columns, under its name; a label without a click has no part in the mean
    AUC of a task with several."""
    random = np.random.default_rng(0)
    outputs, labels = random.normal(size=(60, 4)), (random.random((60, 4)) < 0.4).astype(float)
    labels[:, 2] = 0
    tasks = (
        Task("click", labels=("click",)),
        Task("tags", labels=("a", "b")),
        Task("n", "mae", ("n",)),
    )
    found = _evaluate_tasks(tasks, outputs, labels, ("auc", "accuracy", "calibration", "mae"))
    chances = 1 / (1 + np.exp(-outputs))
    right = ((chances > 0.5) == labels).mean(axis=0)
    assert found == pytest.approx(
        {
            "click/auc": _pair_auc(outputs[:, 0], labels[:, 0]),
            "tags/auc": _pair_auc(outputs[:, 1], labels[:, 1]),
            "click/accuracy": right[0],
            "tags/accuracy": right[1:3].mean(),
            "click/calibration": chances[:, 0].sum() / labels[:, 0].sum(),
            "tags/calibration": chances[:, 1].sum() / labels[:, 1].sum(),
            "n/calibration": outputs[:, 3].sum() / labels[:, 3].sum(),
            "n/mae": np.abs(outputs - labels)[:, 3].mean(),
        },
        rel=1e-5,
    )


def test_large_scores_keep_their_order():
    """Where a sigmoid would be 1 for all: the AUC of a ranking loss, whose scores have no bound."""
    scores = np.array([[100.0], [200.0], [300.0], [400.0]])
    tasks = (Task("r", "bpr", ("r",)),)
    found = _evaluate_tasks(tasks, scores, np.array([[0.0], [1], [0], [1]]), ("auc",))
    assert found["auc"] == pytest.approx(0.75)
