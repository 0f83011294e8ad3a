"""Unsharded training in plain PyTorch: what sharded training must equal.

Uses nothing of shardemb or TorchRec: `nn.EmbeddingBag`, dense gradients, textbook optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

TABLE_LR, DENSE_LR = 0.1, 0.05
# Large, because Adagrad turns the rounding of a gradient near zero into a step of full size.
EPS = 1e-3


@dataclass(frozen=True)
class Table:
    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    pooling: str = "sum"


TABLES = (
    Table("narrow", 37, 8, ("f_narrow",)),
    Table("mean", 50, 16, ("f_mean",), "mean"),
    Table("tiny", 3, 8, ("f_tiny",)),  # fewer rows than four ranks
    Table("shared", 29, 12, ("f_left", "f_right")),
)
FEATURES = tuple(feature for table in TABLES for feature in table.features)
OUT_DIM = sum(table.dim * len(table.features) for table in TABLES)
NUM_DENSE = 3


@dataclass
class Rows:
    """Some rows of data: ids and weights are lists of lists, one for each row."""

    dense: torch.Tensor
    labels: torch.Tensor
    ids: dict[str, list[list[int]]]
    weights: dict[str, list[list[float]]]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Rows:
        cut = slice(start, stop)
        return Rows(
            self.dense[cut],
            self.labels[cut],
            {name: bags[cut] for name, bags in self.ids.items()},
            {name: bags[cut] for name, bags in self.weights.items()},
        )


def draw_rows(count: int, generator: torch.Generator) -> Rows:
    """Random rows; every feature has empty bags, repeated ids and bags of up to four."""
    ids: dict[str, list[list[int]]] = {}
    weights: dict[str, list[list[float]]] = {}
    for table in TABLES:
        for feature in table.features:
            lengths = torch.randint(0, 5, (count,), generator=generator).tolist()
            ids[feature] = [
                torch.randint(0, table.rows, (n,), generator=generator).tolist() for n in lengths
            ]
            weights[feature] = [
                (torch.rand(n, generator=generator) + 0.5).tolist() for n in lengths
            ]
    return Rows(
        dense=torch.randn(count, NUM_DENSE, generator=generator),
        labels=torch.randint(0, 2, (count,), generator=generator).float(),
        ids=ids,
        weights=weights,
    )


def first_weights(seed: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {table.name: (table.rows, table.dim) for table in TABLES}
    shapes |= {"hidden.weight": (6, OUT_DIM + NUM_DENSE), "hidden.bias": (6,)}
    shapes |= {"out.weight": (1, 6), "out.bias": (1,)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


class DenseLayers(nn.Module):
    """Concatenate, one hidden layer, one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(OUT_DIM + NUM_DENSE, 6)
        self.out = nn.Linear(6, 1)

    def forward(self, dense: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(torch.cat([dense, pooled], dim=1))))


@dataclass(frozen=True)
class Rule:
    """How a table is trained; `frozen` are the steps in which it is not, counted from 1."""

    name: str
    lr: float = TABLE_LR
    weight_decay: float = 0.0
    max_gradient: float | None = None
    frozen: range = range(0)


@dataclass
class Reference:
    """`column_shards[table]` > 1 keeps what is one value a row for each column shard, as FBGEMM.

    `rules` are of tables that have their own; `clip` limits the gradients of dense layers.
    """

    table_optimizer: str
    dense_optimizer: str
    weighted: bool
    column_shards: dict[str, int] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    clip: Callable[[list[nn.Parameter]], object] = lambda _: None

    def train(self, steps: list[Rows]) -> dict[str, torch.Tensor]:
        """Tables, their optimizer state (`NAME.state`) and dense weights after `steps`."""
        first = first_weights()
        tables = {
            table.name: _Table(
                table,
                self.rules.get(table.name, Rule(self.table_optimizer)),
                self.column_shards.get(table.name, 1),
                first[table.name],
            )
            for table in TABLES
        }
        layers = DenseLayers()
        layers.load_state_dict({n: first[n] for n in layers.state_dict()})
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        make |= {"adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}
        dense = make[self.dense_optimizer](layers.parameters(), lr=DENSE_LR, weight_decay=0.0)
        for step, rows in enumerate(steps, start=1):
            pooled = [each for table in tables.values() for each in table.pool(rows, self.weighted)]
            logits = layers(rows.dense, torch.cat(pooled, dim=1))[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, rows.labels)
            dense.zero_grad()
            for table in tables.values():
                table.bag.zero_grad()
            loss.backward()
            self.clip(list(layers.parameters()))
            dense.step()
            for table in tables.values():
                if step not in table.rule.frozen:
                    table.update(rows)
        result = {name: table.weight.detach() for name, table in tables.items()}
        result |= {f"{n}.state": t.state for n, t in tables.items() if t.state is not None}
        return result | {n: p.detach() for n, p in layers.state_dict().items()}


class _Table:
    def __init__(self, table: Table, rule: Rule, shards: int, weight: torch.Tensor) -> None:
        self.table, self.rule, self.shards, self.steps = table, rule, shards, 0
        self.bag = nn.EmbeddingBag(
            *(table.rows, table.dim), mode="sum", include_last_offset=True, _weight=weight.clone()
        )
        self.weight = self.bag.weight
        self.moments = torch.zeros(table.rows, table.dim)
        by_element = rule.name in ("adagrad", "adam", "lamb")
        self.state = torch.zeros(table.rows, table.dim if by_element else shards)
        if rule.name == "sgd":
            self.state = None

    def pool(self, rows: Rows, weighted: bool) -> Iterator[torch.Tensor]:
        for feature in self.table.features:
            ids, weights = rows.ids[feature], rows.weights[feature]
            lengths = torch.tensor([len(bag) for bag in ids])
            offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
            scale = torch.tensor([w for bag in weights for w in bag])
            if not weighted:
                scale = torch.ones_like(scale)
            if self.table.pooling == "mean":
                scale = scale / lengths.repeat_interleave(lengths)
            flat = torch.tensor([i for bag in ids for i in bag], dtype=torch.long)
            pooled = self.bag(flat, offsets, per_sample_weights=scale)
            if self.rule.max_gradient:
                pooled.register_hook(self._limit)
            yield pooled

    def _limit(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-self.rule.max_gradient, self.rule.max_gradient)

    @torch.no_grad()
    def update(self, rows: Rows) -> None:
        """Row by row, of those looked up."""
        self.steps += 1
        change = self._adam if "adam" in self.rule.name or "lamb" in self.rule.name else self._grad
        for row in sorted({i for f in self.table.features for bag in rows.ids[f] for i in bag}):
            step = change(row) + self.rule.weight_decay * self.weight[row]
            if "lamb" in self.rule.name:
                own, new = self.weight[row].view(self.shards, -1), step.view(self.shards, -1)
                step = (own.norm(dim=1) / new.norm(dim=1))[:, None] * new
            self.weight[row] -= self.rule.lr * step.flatten()

    def _adam(self, row: int) -> torch.Tensor:
        gradient = self.weight.grad[row]
        columns = gradient.view(self.state.shape[1], -1)
        self.moments[row] = 0.9 * self.moments[row] + 0.1 * gradient
        self.state[row] = 0.999 * self.state[row] + 0.001 * (columns**2).mean(dim=1)
        size = (self.state[row] / (1 - 0.999**self.steps)).sqrt() + EPS
        size = size.repeat_interleave(columns.shape[1])
        return self.moments[row] / (1 - 0.9**self.steps) / size

    def _grad(self, row: int) -> torch.Tensor:
        """SGD, Adagrad, and row-wise Adagrad: one sum for each column shard."""
        gradient = self.weight.grad[row]
        if self.state is None:
            return gradient
        columns = gradient.view(self.state.shape[1], -1)
        self.state[row] += (columns**2).mean(dim=1)
        return (columns / (self.state[row].sqrt() + EPS)[:, None]).flatten()
