"""The hidden model behind synthetic data: it gives every row its true click probability."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from shardemb.data.dataset import BestReachable
from shardemb.data.hashing import mix64

_Floats = NDArray[np.float64]

CLICK_RATE = 0.25
BEST_AUC = 0.82
# Shares of the logit's variance. Interactions are what a model without them cannot learn.
_SHARES = (0.55, 0.25, 0.20)  # feature effects, their products, counts
_PAIRED_FEATURES = 4  # the strongest features interact, each with each
# An id's effect shrinks with its popularity rank: rare ids are seen too seldom to be learned,
# and a best score built on them would be out of any model's reach.
_HALF_VARIANCE_RANK = 10.0
_MAX_LOGIT_STD = 8.0
_BISECTIONS = 30


class ClickModel:
    """logit = bias + feature effects + products of feature effects + log counts, all linear.

    `calibrate` scales the parts so that the click rate is CLICK_RATE and the AUC of the true
    probabilities BEST_AUC, in expectation.
    """

    def __init__(self, num_features: int, num_dense: int, random: np.random.Generator) -> None:
        self._keys = random.integers(1 << 63, size=num_features, dtype=np.uint64)
        self._feature_weights = random.exponential(size=num_features)
        self._dense_weights = random.normal(size=num_dense)
        strongest = np.argsort(-self._feature_weights)[:_PAIRED_FEATURES]
        self._pairs = list(combinations(strongest.tolist(), 2))
        self._effect_mean = self._effect_std = np.ones(num_features)
        self._count_mean = self._count_std = np.ones(num_dense)
        self._scales = np.ones(3)
        self._bias = 0.0

    def id_effects(self, feature: int, ranks: NDArray[np.int64]) -> _Floats:
        """The hidden effect of each id of a feature, given by its popularity rank."""
        return _hashed_normals(ranks, self._keys[feature]) / np.sqrt(
            1 + ranks / _HALF_VARIANCE_RANK
        )

    def calibrate(self, effects: _Floats, log_counts: _Floats) -> None:
        """Fix every scale from a sample of rows."""
        self._effect_mean, self._effect_std = _mean_and_std(effects)
        self._count_mean, self._count_std = _mean_and_std(log_counts)
        parts = self._parts(effects, log_counts)
        _, stds = _mean_and_std(parts)
        shares = np.array(_SHARES) * (parts != parts[0]).any(axis=0)
        self._scales = np.sqrt(shares / max(shares.sum(), 1e-12)) / stds
        total = np.sort(parts @ self._scales)

        def auc_above(logit_std: float) -> bool:
            logits = total * logit_std
            return _expected_auc(logits + _bias(logits)) > BEST_AUC

        logit_std = _bisect(auc_above, 0, _MAX_LOGIT_STD)
        self._scales *= logit_std
        self._bias = _bias(total * logit_std)

    def logits(self, effects: _Floats, log_counts: _Floats) -> _Floats:
        """The true logit of each row."""
        return self._bias + self._parts(effects, log_counts) @ self._scales

    def _parts(self, effects: _Floats, log_counts: _Floats) -> _Floats:
        """Each row's feature effects, interactions and counts, each summed with its weights."""
        effects = (effects - self._effect_mean) / self._effect_std
        counts = np.nan_to_num((log_counts - self._count_mean) / self._count_std)
        pairs = np.zeros(len(effects))
        for left, right in self._pairs:
            pairs += effects[:, left] * effects[:, right]
        singles = effects @ self._feature_weights
        return np.stack([singles, pairs, counts @ self._dense_weights], axis=1)


class Scores:
    """Collects the true logits and the drawn labels of the test split."""

    def __init__(self) -> None:
        self._logits: list[_Floats] = []
        self._labels: list[NDArray[np.bool_]] = []

    def add(self, logits: _Floats, labels: NDArray[np.int8]) -> None:
        self._logits.append(logits)
        self._labels.append(labels.astype(bool))

    def best_reachable(self) -> BestReachable | None:
        """None where an AUC has no meaning: without clicks, or with nothing else."""
        if not self._logits:
            return None
        logits, clicked = np.concatenate(self._logits), np.concatenate(self._labels)
        if clicked.all() or not clicked.any():
            return None
        logloss = np.logaddexp(0, np.where(clicked, -logits, logits)).mean()
        return BestReachable(auc=_auc(logits, clicked), logloss=float(logloss))


def _auc(scores: _Floats, clicked: NDArray[np.bool_]) -> float:
    """The area under the ROC curve, from ranks; ties count half."""
    positives = int(clicked.sum())
    rank_sum = rankdata(scores)[clicked].sum()
    negatives = len(clicked) - positives
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def _expected_auc(sorted_logits: _Floats) -> float:
    """The AUC of the true probabilities, over all the labels they can draw."""
    clicks = 1 / (1 + np.exp(-sorted_logits))
    _, starts = np.unique(sorted_logits, return_index=True)
    clicks_of, others_of = np.add.reduceat(clicks, starts), np.add.reduceat(1 - clicks, starts)
    others_below = np.cumsum(others_of) - others_of / 2
    return float(clicks_of @ others_below / (clicks.sum() * (1 - clicks).sum()))


def _bias(logits: _Floats) -> float:
    """What to add to the logits for a mean click rate of CLICK_RATE."""

    def rate_above(bias: float) -> bool:
        return float((1 / (1 + np.exp(-bias - logits))).mean()) > CLICK_RATE

    return _bisect(rate_above, -10 * _MAX_LOGIT_STD, 10 * _MAX_LOGIT_STD)


def _bisect(above: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return (low + high) / 2


def _mean_and_std(columns: _Floats) -> tuple[_Floats, _Floats]:
    """Of each column, nulls left out; 1 stands for the spread of a constant."""
    mean, std = np.nanmean(columns, axis=0), np.nanstd(columns, axis=0)
    return mean, np.where(std > 1e-9, std, 1.0)


def _hashed_normals(values: NDArray[np.int64], key: np.uint64) -> _Floats:
    """A number for each value, near normal over many: the sum of four uniform 16-bit pieces."""
    bits = mix64((values.astype(np.uint64) + key).view(np.int64))
    pieces = np.zeros(len(bits), np.uint64)
    for shift in (0, 16, 32, 48):
        pieces += (bits >> np.uint64(shift)) & np.uint64(0xFFFF)
    normals: _Floats = (pieces / 65535.0 - 2.0) * np.sqrt(3.0)
    return normals
