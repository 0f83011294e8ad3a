"""Measurements of a machine that follows a known law, and a profile fitted to them."""

from __future__ import annotations

import numpy as np

from planner.cost.measurements import (
    COLLECTIVES,
    CollectiveSample,
    Environment,
    KernelSample,
    Measurements,
)
from planner.storage import OPTIMIZER_STATE
from planner.tables import TableSpec

ENVIRONMENT = Environment(
    device_type="cpu",
    device_name="a machine of the tests",
    cores=2,
    threads=1,
    torch="2",
    fbgemm="1",
    date="2024-12-31",
)
LATENCY_MS, CACHE_MS = 0.05, 2.0
BYTES_A_MS = 4e6


def draw_tables(generator: np.random.Generator, count: int) -> tuple[TableSpec, ...]:
    optimizer = str(generator.choice(["sgd", "adagrad", "rowwise_adagrad"]))
    return tuple(
        TableSpec(
            name=f"t{i}",
            num_embeddings=int(10 ** generator.uniform(2, 6)),
            embedding_dim=4 * int(2 ** generator.uniform(0, 6)),
            pooling_factor=float(10 ** generator.uniform(0, 1.5)),
            optimizer=optimizer,
        )
        for i in range(count)
    )


def law(tables: tuple[TableSpec, ...], batch_size: int) -> tuple[float, float]:
    """Forward: a launch, and the bytes gathered. Backward reads and writes rows and states, and
    takes three times as long beyond what a cache holds: not the sum of its tables."""
    lookups = [table.pooling_factor * batch_size for table in tables]
    gathered = sum(n * t.embedding_dim * 4 for n, t in zip(lookups, tables, strict=True))
    state = OPTIMIZER_STATE[tables[0].optimizer]
    each = [4 * (t.embedding_dim * (1 + state[1]) + state[0]) for t in tables]
    updated = sum(n * size for n, size in zip(lookups, each, strict=True)) / BYTES_A_MS
    return LATENCY_MS + gathered / BYTES_A_MS, LATENCY_MS + max(updated, 3 * updated - CACHE_MS)


def collective_law(sent_bytes: tuple[int, ...]) -> float:
    """A latency and the bytes of the busiest rank."""
    return 0.2 + 1e-6 * max(sent_bytes)


def measurements(sets: int = 500, calls: int = 60, seed: int = 0) -> Measurements:
    """Four sets of tables a task; `calls` of each collective, over two ranks."""
    generator = np.random.default_rng(seed)
    kernels, collectives = [], []
    for number in range(sets):
        batch_size = int(2 ** np.random.default_rng([seed, number // 4]).uniform(6, 12))
        tables = draw_tables(generator, int(generator.integers(1, 9)))
        kernels.append(KernelSample(number // 4, tables, batch_size, *law(tables, batch_size)))
    for kind in COLLECTIVES:
        for _ in range(calls):
            size = int(10 ** generator.uniform(2, 7))
            sent = (size, int(size * generator.uniform()) if kind == "all_to_all" else size)
            collectives.append(CollectiveSample(kind, sent, collective_law(sent)))
    return Measurements(ENVIRONMENT, tuple(kernels), tuple(collectives))
