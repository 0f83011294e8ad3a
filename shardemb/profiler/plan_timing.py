"""A plan run here with random ids: what its lookups and collectives take on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType

from planner import Plan, RequestError, TableSpec
from planner.cost.predict import table_specs
from shardemb.optim import make_optimizer
from shardemb.optimizer_config import DenseOptimizerConfig, TableOptimizerConfig
from shardemb.profiler.ids import ID_BATCHES, draw_ids
from shardemb.profiler.timing import WARM_UP, Timing, summarize, timed
from shardemb.sharding.shard_model import ShardedModel, shard_model

_DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}


@dataclass(frozen=True)
class PlanTiming:
    """Medians in milliseconds.

    In `stages` [ranks, 4], the order of planner.cost.stages, every stage was started by all ranks
    together. The gradients of replicated tables are summed over ranks while kernels run, so that
    is in the kernels' backward. A step runs through at once.
    """

    stages: NDArray[np.float64]
    step: Timing


def time_plan(plan: Plan, device: torch.device, *, repetitions: int, seed: int = 0) -> PlanTiming:
    """The embedding part of training steps under `plan`, forward and backward; a collective.

    Each rank looks up `plan.batch_size` rows, with as many ids as the tables' pooling factors
    and as much reuse as their histograms say.
    """
    refuse_unknown(plan)
    run = TimedPlan(plan, device, seed)
    stages, steps = [], []
    for number in range(WARM_UP + repetitions):
        found = run.stages(), run.step()
        if number >= WARM_UP:
            stages.append(found[0])
            steps.append(found[1])
    own = torch.tensor(np.median(stages, axis=0), device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    slowest = torch.tensor(steps, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return PlanTiming(torch.stack(every).cpu().numpy(), summarize(slowest.tolist()))


def refuse_unknown(plan: Plan) -> None:
    """RequestError where the plan has what cannot be timed, or nobody can tell the batch."""
    if plan.batch_size is None:
        raise RequestError("the plan has no batch size to run it with: plan with --batch-size")
    refuse_unpooled(plan)


def refuse_unpooled(plan: Plan) -> None:
    for table in table_specs(plan):
        if not table.pooled:
            raise RequestError(f"table {table.name} is not pooled: only pooled lookups are timed")


class TimedPlan:
    """The plan's tables, sharded, and the batches that are looked up."""

    def __init__(self, plan: Plan, device: torch.device, seed: int) -> None:
        assert plan.batch_size is not None
        self.device = device
        tables = table_specs(plan)
        self.parts = [
            [table for table in tables if table.weighted is weighted]
            for weighted in (False, True)
            if any(table.weighted is weighted for table in tables)
        ]
        self.model, self.optimizer = _sharded(self.parts, plan, device)
        generator = np.random.default_rng([seed, dist.get_rank()])
        drawn = [
            [_draw(part, plan.batch_size, generator).to(device) for part in self.parts]
            for _ in range(ID_BATCHES)
        ]
        self.batches = cycle(drawn)
        widths = [sum(t.embedding_dim * t.num_features for t in part) for part in self.parts]
        self.gradients = [
            torch.from_numpy(generator.random((plan.batch_size, width), np.float32)).to(device)
            for width in widths
        ]

    @property
    def collections(self) -> Sequence[Any]:
        parts = self.model.module
        assert isinstance(parts, nn.ModuleList)
        return list(parts)

    def step(self) -> float:
        """The milliseconds of a whole step of this rank."""
        batch = next(self.batches)

        def work() -> None:
            pooled = [part(each) for part, each in zip(self.collections, batch, strict=True)]
            torch.autograd.backward([each.values() for each in pooled], self.gradients)
            self.optimizer.step()

        self.optimizer.zero_grad()
        return self._timed(work)[1]

    def stages(self) -> NDArray[np.float64]:
        """[4]: those of this rank."""
        self.optimizer.zero_grad()
        found = np.zeros(4)
        batch = next(self.batches)
        for part, features, gradient in zip(self.collections, batch, self.gradients, strict=True):
            found += self._stages_of(part, features, gradient)
        found[2] += self._timed(self.optimizer.step)[1]
        return found

    def _stages_of(
        self, part: Any, features: KeyedJaggedTensor, gradient: torch.Tensor
    ) -> list[float]:
        context = part.create_context()
        received, ids_ms = self._timed(lambda: part.input_dist(context, features).wait().wait())
        outputs, forward_ms = self._timed(lambda: part.compute(context, received))
        # The graph is cut here, so that the backward of each side can be timed alone.
        sent = [each.detach().requires_grad_() for each in outputs]
        values, embeddings_ms = self._timed(lambda: part.output_dist(context, sent).wait().values())
        _, gradients_ms = self._timed(lambda: torch.autograd.backward(values, gradient))
        # A rank without shards of a sharding type has an output that nothing led to.
        ends = [each for each in zip(outputs, sent, strict=True) if each[0].requires_grad]
        own, gradients = [output for output, _ in ends], [end.grad for _, end in ends]
        _, backward_ms = self._timed(lambda: torch.autograd.backward(own, gradients))
        return [forward_ms, ids_ms + embeddings_ms, backward_ms, gradients_ms]

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """All ranks start together."""
        dist.barrier()
        return timed(self.device, work)


def _sharded(
    parts: Sequence[Sequence[TableSpec]], plan: Plan, device: torch.device
) -> tuple[ShardedModel, Any]:
    collections = [
        EmbeddingBagCollection(
            [_config(table) for table in part],
            is_weighted=part[0].weighted,
            device=torch.device("meta"),
        )
        for part in parts
    ]
    tables = {
        table.name: TableOptimizerConfig(name=table.optimizer) for part in parts for table in part
    }
    model = shard_model(nn.ModuleList(collections), plan, table_optimizers=tables, device=device)
    for state in model.buffers():  # memory never written is a page of zeros to a CPU: too fast
        state.copy_(state.clone())
    return model, make_optimizer(model, plan, DenseOptimizerConfig(), tables)


def _config(table: TableSpec) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(_features(table)),
        data_type=_DTYPES[table.dtype],
        init_fn=partial(nn.init.constant_, val=0.01),
    )


def _features(table: TableSpec) -> Iterator[str]:
    """Their own names may be missing, and are not unique to the table."""
    return (f"{table.name}/{number}" for number in range(table.num_features))


def _draw(
    tables: Sequence[TableSpec], batch_size: int, generator: np.random.Generator
) -> KeyedJaggedTensor:
    drawn = {
        feature: draw_ids(table, batch_size, generator)
        for table in tables
        for feature in _features(table)
    }
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in drawn.values()]))
    return KeyedJaggedTensor(
        keys=list(drawn),
        values=ids,
        lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in drawn.values()])),
        weights=torch.rand(len(ids)) if tables[0].weighted else None,
    )
