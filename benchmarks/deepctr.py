"""Training steps a second next to DeepCTR-Torch, on the whole of one CPU machine.

    pip install deepctr-torch
    python -m benchmarks.deepctr mlperf_dlrm_dcnv2.json --markdown benchmarks/results/deepctr.md

Both train DeepCTR-Torch's DCN, with its own cross network and layers, on the same rows with
Adagrad and no regularization: over its tables in one process with a thread for each core, as its
`fit` steps, and over sharded tables in one rank, and in a rank for each core. Processes take turns.
Tables have at most 500,000 rows, of 64 columns; a row has one id of each feature, or as many as
MLPerf's data.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

if not __package__:  # started as a file: its own folder must not hide the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import typer
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.layers import DNN, CrossNet
from deepctr_torch.models import DCN
from torch import nn
from torch.nn.functional import binary_cross_entropy

from benchmarks.step_throughput import (
    COLUMNS,
    NUM_DENSE,
    Case,
    Step,
    collection,
    draw_batches,
    sharded_step,
    tables_of,
    timed,
)
from launch.local import run_workers
from planner import TableSpec
from shardemb.data.batch import Batch
from shardemb.optimizer_config import DenseOptimizerConfig, TableOptimizerConfig
from shardemb.quiet import silence_libraries
from shardemb.ranks import process_group

ROWS, DNN_LAYERS, CROSS_LAYERS, RATE = 2048, (256, 128), 3, 0.01  # rows of a step, over all ranks
WARM_UP, STEPS, TURNS, CORES = 2, 8, 3, os.cpu_count() or 1
ADAGRAD: dict[str, Any] = {"name": "adagrad", "lr": RATE}
IDS = {"one id": "dlrm", "MLPerf's ids": "dcn_v2"}
WAYS = [("DeepCTR-Torch", "fp32", 1), ("shardemb", "fp32", 1), ("shardemb", "fp32", CORES)]
WAYS += [("shardemb", "auto", CORES)]


def deepctr(case: Case) -> Step:
    features = [
        SparseFeat(table.name, table.num_embeddings + 1, COLUMNS)
        if table.pooling_factor == 1
        else VarLenSparseFeat(
            SparseFeat(table.name, table.num_embeddings + 1, COLUMNS),
            round(table.pooling_factor),
            "sum",
        )
        for table in case.tables
    ]
    features += [DenseFeat(f"I{i}", 1) for i in range(NUM_DENSE)]
    none = {f"l2_reg_{part}": 0 for part in ("linear", "embedding", "cross", "dnn")}
    model = DCN([], features, CROSS_LAYERS, "vector", DNN_LAYERS, device="cpu", **none)
    # Adagrad as torch has it: DeepCTR-Torch's own choice of it by name has the same.
    optimizer = torch.optim.Adagrad(model.parameters(), lr=RATE)
    model.train()
    inputs = cycle([(in_columns(batch), batch.labels) for batch in case.batches])

    def step() -> None:
        values, labels = next(inputs)
        optimizer.zero_grad()
        loss = binary_cross_entropy(model(values).squeeze(), labels, reduction="sum")
        (loss + model.get_regularization_loss() + model.aux_loss).backward()
        optimizer.step()

    return step


def in_columns(batch: Batch) -> torch.Tensor:
    """[rows, ids and dense]: its input. Id 0 is padding there, so ours are one more."""
    ids = [part.values().view(len(batch.mask), -1) + 1 for part in batch.sparse.to_dict().values()]
    return torch.cat([*(each.float() for each in ids), batch.dense], dim=1)


class SameDCN(nn.Module):
    """DeepCTR-Torch's DCN over tables that can be sharded."""

    def __init__(self, tables: tuple[TableSpec, ...]) -> None:
        super().__init__()
        self.names = [table.feature_names[0] for table in tables]
        self.embeddings = collection(tables)
        width = COLUMNS * len(tables) + NUM_DENSE
        self.dnn = DNN(width, DNN_LAYERS, l2_reg=0)
        self.crossnet = CrossNet(width, CROSS_LAYERS, "vector")
        self.dnn_linear = nn.Linear(width + DNN_LAYERS[-1], 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        pooled = self.embeddings(batch.sparse)
        inputs = torch.cat([*(pooled[name] for name in self.names), batch.dense], dim=1)
        both = torch.cat([self.crossnet(inputs), self.dnn(inputs)], dim=1)
        logits: torch.Tensor = self.dnn_linear(both)
        return logits


def work(way: str, precision: str, ids: str, path: str, out: str) -> None:
    """One rank: rank 0 writes the rows a second."""
    silence_libraries()
    with process_group("cpu"):
        tables = tables_of(IDS[ids], Path(path))
        batches = draw_batches(tables, ROWS // dist.get_world_size())
        case = Case(IDS[ids], tables, batches)
        if way == WAYS[0][0]:
            step = deepctr(case)
        else:
            optimizers = TableOptimizerConfig(**ADAGRAD), DenseOptimizerConfig(**ADAGRAD)
            step = sharded_step(SameDCN(tables), case, *optimizers, precision)
        timed(step, WARM_UP)
        seconds = timed(step, STEPS)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(ROWS * STEPS / seconds))


def measured(path: Path) -> Iterator[str]:
    """Rows of a table."""
    for ids in IDS:
        found: list[list[float]] = [[] for _ in WAYS]
        for _ in range(TURNS):
            for (way, precision, ranks), rates in zip(WAYS, found, strict=True):
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "found.json"
                    arguments = ["-m", "benchmarks.deepctr", "work", way, precision, ids]
                    run_workers([*arguments, str(path), str(out)], ranks)
                    rates.append(json.loads(out.read_text()))
        for (way, precision, ranks), rates in zip(WAYS, found, strict=True):
            ratio = statistics.median(a / b for a, b in zip(rates, found[0], strict=True))
            cells = f"{statistics.median(rates):,.0f} | {ratio:.2f} | "
            row = f"| {ids} | {way} | {precision} | {ranks} | {cells}"
            row += f"{min(rates):,.0f}, {max(rates):,.0f} |"
            print(row, file=sys.stderr)  # the others take minutes more
            yield row


def main(
    path: Annotated[Path, typer.Argument(metavar="TABLES", help="MLPerf's table list")],
    markdown_path: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    heading = (
        f"{platform.processor() or platform.machine()}, {CORES} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, deepctr-torch "
        f"{version('deepctr-torch')}; {ROWS} rows a step; medians of {TURNS} processes each, "
        f"{STEPS} steps."
    )
    columns = "| ids | way | dense part | ranks | samples/s | of DeepCTR-Torch's | range |"
    rows = [columns, "|---|---|---|---:|---:|---:|---:|", *measured(path)]
    text = "\n".join(["# Next to DeepCTR-Torch", "", heading, "", *rows, ""])
    if markdown_path:
        markdown_path.write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        typer.run(main)
