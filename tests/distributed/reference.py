"""Unsharded training in plain PyTorch: what sharded training must equal.

Uses nothing of shardemb or TorchRec: `nn.EmbeddingBag`, dense gradients, textbook optimizers.
"""

from __future__ import annotations

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


@dataclass
class Reference:
    """`column_shards[table]` > 1 keeps one row-wise momentum for each column shard, as FBGEMM."""

    table_optimizer: str
    dense_optimizer: str
    weighted: bool
    column_shards: dict[str, int] = field(default_factory=dict)

    def train(self, steps: list[Rows]) -> dict[str, torch.Tensor]:
        """Tables, their optimizer state (`NAME.state`) and dense weights after `steps`."""
        first = first_weights()
        bags = {
            t.name: nn.EmbeddingBag(
                t.rows, t.dim, mode="sum", include_last_offset=True, _weight=first[t.name].clone()
            )
            for t in TABLES
        }
        layers = DenseLayers()
        layers.load_state_dict({n: first[n] for n in layers.state_dict()})
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        make |= {"adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}
        dense = make[self.dense_optimizer](layers.parameters(), lr=DENSE_LR, weight_decay=0.0)
        state = {t.name: self._first_state(t) for t in TABLES}
        moments = {t.name: torch.zeros(t.rows, t.dim) for t in TABLES}
        for step, rows in enumerate(steps, start=1):
            logits = layers(rows.dense, self._pool(bags, rows))[:, 0]
            loss = nn.functional.binary_cross_entropy_with_logits(logits, rows.labels)
            dense.zero_grad()
            for bag in bags.values():
                bag.zero_grad()
            loss.backward()
            dense.step()
            for table in TABLES:
                weight, shards = bags[table.name].weight, self.column_shards.get(table.name, 1)
                if "adam" in self.table_optimizer:
                    ids = {i for f in table.features for bag in rows.ids[f] for i in bag}
                    self._adam(weight, moments[table.name], state[table.name], sorted(ids), step)
                else:
                    self._update(weight, state[table.name], shards)
        result = {name: bag.weight.detach() for name, bag in bags.items()}
        result |= {f"{name}.state": s for name, s in state.items() if s is not None}
        return result | {n: p.detach() for n, p in layers.state_dict().items()}

    def _pool(self, bags: dict[str, nn.EmbeddingBag], rows: Rows) -> torch.Tensor:
        pooled = []
        for table in TABLES:
            for feature in table.features:
                ids, weights = rows.ids[feature], rows.weights[feature]
                lengths = torch.tensor([len(bag) for bag in ids])
                offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
                scale = torch.tensor([w for bag in weights for w in bag])
                if not self.weighted:
                    scale = torch.ones_like(scale)
                if table.pooling == "mean":
                    scale = scale / lengths.repeat_interleave(lengths)
                flat = torch.tensor([i for bag in ids for i in bag], dtype=torch.long)
                pooled.append(bags[table.name](flat, offsets, per_sample_weights=scale))
        return torch.cat(pooled, dim=1)

    def _first_state(self, table: Table) -> torch.Tensor | None:
        if self.table_optimizer == "sgd":
            return None
        if self.table_optimizer in ("adagrad", "adam"):
            return torch.zeros(table.rows, table.dim)
        return torch.zeros(table.rows, self.column_shards.get(table.name, 1))

    @torch.no_grad()
    def _adam(
        self,
        weight: torch.Tensor,
        moments: torch.Tensor,
        squares: torch.Tensor | None,
        ids: list[int],
        step: int,
    ) -> None:
        """Row by row, of those looked up; row-wise: one second moment for each column shard."""
        assert weight.grad is not None
        assert squares is not None
        for row in ids:
            gradient = weight.grad[row]
            columns = gradient.view(squares.shape[1], -1)
            moments[row] = 0.9 * moments[row] + 0.1 * gradient
            squares[row] = 0.999 * squares[row] + 0.001 * (columns**2).mean(dim=1)
            size = (squares[row] / (1 - 0.999**step)).sqrt() + EPS
            size = size.repeat_interleave(columns.shape[1])
            weight[row] -= TABLE_LR * moments[row] / (1 - 0.9**step) / size

    @torch.no_grad()
    def _update(self, weight: torch.Tensor, state: torch.Tensor | None, shards: int) -> None:
        gradient = weight.grad
        assert gradient is not None
        if state is None:
            weight -= TABLE_LR * gradient
        elif self.table_optimizer == "adagrad":
            state += gradient**2
            weight -= TABLE_LR * gradient / (state.sqrt() + EPS)
        else:
            columns = gradient.view(len(gradient), shards, -1)
            state += (columns**2).mean(dim=2)
            step = TABLE_LR * columns / (state.sqrt() + EPS)[:, :, None]
            weight -= step.reshape(weight.shape)
