"""Training steps a second: shardemb, TorchRec used bare, and DDP with sparse embedding bags.

    python -m benchmarks.step_throughput mlperf_dlrm_dcnv2.json \
        --markdown benchmarks/results/step_throughput.md

All train the same model on the same batches with the same optimizers, in the same gloo ranks, in
turns of a few steps each. DLRM looks up one id of each of Criteo's 26 features, DCN-v2 as many as
MLPerf's multi-hot data have; tables have at most 500,000 rows, of 64 columns.

TorchRec: DistributedModelParallel with the plan of its own planner, with and without its
TrainPipelineSparseDist. DDP: torch.nn.EmbeddingBag(sparse=True) on every rank, its gradients summed
over ranks. The layers of all but shardemb are those of torchrec.models.dlrm.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if not __package__:  # started as a file: its own folder must not hide the packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.optim import KeyedOptimizerWrapper, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.torchrec_planner import problem
from launch.local import run_workers
from planner import TableSpec
from planner.hardware import preset
from planner.learned_plan import make_learned_plan
from planner.request import learned_cost
from planner.table_list import load_table_list
from shardemb.data.batch import Batch
from shardemb.dense_precision import has_bf16
from shardemb.models.dcn_v2 import DCNv2
from shardemb.models.dlrm import DLRM
from shardemb.optimizer_config import DenseOptimizerConfig, TableOptimizerConfig
from shardemb.precision_config import PrecisionConfig
from shardemb.quiet import silence_libraries
from shardemb.ranks import process_group
from shardemb.sharding.shard_model import current_topology, shard_model
from shardemb.trainer import Trainer

MOST_ROWS, COLUMNS, NUM_DENSE, BATCH_SIZE = 500_000, 64, 13, 2048
DENSE_LAYERS, OVER_LAYERS = (512, 256), (512, 512, 256)
CROSS_LAYERS, LOW_RANK = 3, 512
TABLE_RATE, DENSE_RATE = 0.01, 0.001
BATCHES, TURN, WARM_UP, TURNS = 8, 6, 3, 5
SKEW = 3.0  # ids are rows * uniform ** SKEW: hot rows, as in click logs
CPU = torch.device("cpu")

Step = Callable[[], None]


class Way(NamedTuple):
    """One of those compared: its name, precision of the dense part, and how it is made."""

    name: str
    precision: str
    make: Callable[[Case, str], Step]


@dataclass(frozen=True)
class Case:
    """A model, and the batches of this rank."""

    model: str
    tables: tuple[TableSpec, ...]
    batches: list[Batch]


def tables_of(model: str, path: Path) -> tuple[TableSpec, ...]:
    """Of the list at `path`: with one id a feature for dlrm, its own pooling for dcn_v2."""
    return tuple(
        TableSpec(
            name=f"t{i}",
            num_embeddings=min(table.num_embeddings, MOST_ROWS),
            embedding_dim=COLUMNS,
            feature_names=(f"f{i}",),
            pooling_factor=table.pooling_factor if model == "dcn_v2" else 1,
        )
        for i, table in enumerate(load_table_list(path).tables)
    )


def draw_batches(tables: Sequence[TableSpec], rows: int = BATCH_SIZE) -> list[Batch]:
    """Of `rows` on this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())

    def draw() -> Batch:
        ids, lengths = [], []
        for table in tables:
            count = round(table.pooling_factor)
            uniform = torch.rand(rows * count, generator=generator, dtype=torch.float64)
            ids.append((uniform**SKEW * table.num_embeddings).long())
            lengths.append(torch.full((rows,), count))
        keys = [table.feature_names[0] for table in tables]
        sparse = KeyedJaggedTensor(keys, torch.cat(ids), lengths=torch.cat(lengths))
        dense = torch.rand(rows, NUM_DENSE, generator=generator)
        labels = (torch.rand(rows, generator=generator) < 0.25).float()
        return Batch(dense, sparse, labels, torch.ones(rows), rows * dist.get_world_size())

    return [draw() for _ in range(BATCHES)]


def collection(tables: Sequence[TableSpec]) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.feature_names),
        )
        for table in tables
    ]
    return EmbeddingBagCollection(configs, device=torch.device("meta"))


# --- The ways


def ours(case: Case, precision: str) -> Step:
    embeddings = collection(case.tables)
    model: nn.Module
    if case.model == "dlrm":
        model = DLRM(embeddings, NUM_DENSE, DENSE_LAYERS, OVER_LAYERS)
    else:
        model = DCNv2(
            embeddings,
            NUM_DENSE,
            (*DENSE_LAYERS, COLUMNS),
            cross_layers=CROSS_LAYERS,
            low_rank=LOW_RANK,
            over_layers=OVER_LAYERS,
        )
    table_optimizer = TableOptimizerConfig(lr=TABLE_RATE)
    dense_optimizer = DenseOptimizerConfig(lr=DENSE_RATE)
    return sharded_step(model, case, table_optimizer, dense_optimizer, precision)


def sharded_step(
    model: nn.Module,
    case: Case,
    table_optimizer: TableOptimizerConfig,
    dense_optimizer: DenseOptimizerConfig,
    precision: str,
) -> Step:
    """Steps of `model`, sharded by the planner under the profile of such a machine."""
    rows = len(case.batches[0].mask)
    topology = current_topology().model_copy(update={"hardware": preset("cpu")})
    plan = [make_learned_plan(case.tables, topology, learned_cost("cpu-2core", rows), rows)]
    dist.broadcast_object_list(plan, src=0)
    plan[0] = plan[0].model_copy(update={"topology": current_topology()})
    trainer = Trainer(
        shard_model(model, plan[0], table_optimizer, device=CPU),
        dense_optimizer,
        precision=PrecisionConfig(dense=precision),  # type: ignore[arg-type]
    )
    pairs = pairwise(cycle(case.batches))

    def step() -> None:
        trainer.train_step(*next(pairs))

    return step


class RivalTrain(nn.Module):
    """A model of torchrec.models.dlrm with its loss, as a user writes it."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.is_bf16 = model, precision == "bf16"

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
            logits = self.model(batch.dense, batch.sparse).squeeze(1)
        loss = binary_cross_entropy_with_logits(logits.float(), batch.labels)
        return loss, logits.detach()


def rival_model(case: Case, embeddings: EmbeddingBagCollection) -> nn.Module:
    sizes = {
        "dense_in_features": NUM_DENSE,
        "dense_arch_layer_sizes": [*DENSE_LAYERS, COLUMNS],
        "over_arch_layer_sizes": [*OVER_LAYERS, 1],
    }
    if case.model == "dlrm":
        return torchrec_dlrm.DLRM(embeddings, **sizes)
    return torchrec_dlrm.DLRM_DCN(
        embeddings, dcn_num_layers=CROSS_LAYERS, dcn_low_rank_dim=LOW_RANK, **sizes
    )


def torchrec_parts(case: Case, precision: str) -> tuple[nn.Module, KeyedOptimizerWrapper]:
    embeddings, planner = problem(
        case.tables, 1, dist.get_world_size(), BATCH_SIZE, compute_device="cpu"
    )
    embeddings = collection(case.tables)
    apply_optimizer_in_backward(RowWiseAdagrad, embeddings.parameters(), {"lr": TABLE_RATE})
    model = RivalTrain(rival_model(case, embeddings), precision)
    sharders: Any = [EmbeddingBagCollectionSharder()]
    assert dist.group.WORLD is not None
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    dense = {n: p for n, p in sharded.named_parameters() if "embedding_bags" not in n}
    adam = KeyedOptimizerWrapper(dense, lambda values: torch.optim.Adam(values, lr=DENSE_RATE))
    return sharded, adam


def torchrec(case: Case, precision: str) -> Step:
    return plain_step(*torchrec_parts(case, precision), case)


def torchrec_pipelined(case: Case, precision: str) -> Step:
    model, optimizer = torchrec_parts(case, precision)
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, execute_all_batches=True)  # type: ignore[arg-type]
    batches = cycle(case.batches)

    def step() -> None:
        pipeline.progress(batches)

    return step


def plain_step(model: nn.Module, optimizer: Any, case: Case) -> Step:
    batches = cycle(case.batches)

    def step() -> None:
        optimizer.zero_grad()
        model(next(batches))[0].backward()
        optimizer.step()

    return step


class SparseBags(nn.Module):
    """What an EmbeddingBagCollection gives, [batch_size, features, columns], of torch's bags."""

    def __init__(self, tables: Sequence[TableSpec]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(t.num_embeddings, t.embedding_dim, mode="sum", sparse=True)
            for t in tables
        )

    def forward(self, sparse: KeyedJaggedTensor) -> torch.Tensor:
        each = [
            bag(part.values(), part.offsets()[:-1])
            for bag, part in zip(self.bags, sparse.to_dict().values(), strict=True)
        ]
        return torch.stack(each, dim=1)


class DDPModel(nn.Module):
    """TorchRec's layers over torch's bags."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        rival = rival_model(case, collection(case.tables))
        self.sparse, self.dense = SparseBags(case.tables), rival.dense_arch
        self.interaction, self.over = rival.inter_arch, rival.over_arch

    def forward(self, dense: torch.Tensor, sparse: KeyedJaggedTensor) -> torch.Tensor:
        return self.over(self.interaction(self.dense(dense), self.sparse(sparse)))


def ddp(case: Case, precision: str) -> Step:
    model = DistributedDataParallel(RivalTrain(DDPModel(case), precision))
    tables = [p for n, p in model.named_parameters() if ".bags." in n]
    others = [p for n, p in model.named_parameters() if ".bags." not in n]
    optimizers = [
        torch.optim.Adagrad(tables, lr=TABLE_RATE),
        torch.optim.Adam(others, lr=DENSE_RATE),
    ]
    batches = cycle(case.batches)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(next(batches))[0].backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


WAYS = (
    Way("shardemb", "fp32", ours),
    Way("TorchRec", "fp32", torchrec),
    Way("TorchRec, pipelined", "fp32", torchrec_pipelined),
    Way("DDP", "fp32", ddp),
    Way("shardemb", "bf16", ours),
    Way("TorchRec", "bf16", torchrec),
    Way("TorchRec, pipelined", "bf16", torchrec_pipelined),
)


# --- Measuring


def work(model: str, path: str, out: str) -> None:
    """One rank: all ways in turns; rank 0 writes the samples a second of each turn."""
    silence_libraries()
    with process_group("cpu"):
        tables = tables_of(model, Path(path))
        case = Case(model, tables, draw_batches(tables))
        steps = [way.make(case, way.precision) for way in WAYS]
        found: list[list[float]] = [[] for _ in WAYS]
        for step in steps:
            timed(step, WARM_UP)
        for _ in range(TURNS):
            for step, rates in zip(steps, found, strict=True):
                rates.append(TURN * BATCH_SIZE * dist.get_world_size() / timed(step, TURN))
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(found))


def timed(step: Step, count: int) -> float:
    """Seconds until all ranks have done `count` steps."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        step()
    dist.barrier()
    return time.perf_counter() - start


class Measured(NamedTuple):
    model: str
    ranks: int
    rates: list[list[float]]  # [ways][turns] samples/s

    def speedup(self, way: int, rival: int) -> float:
        """Turn by turn: what slows the machine slows neighbours alike."""
        pairs = zip(self.rates[way], self.rates[rival], strict=True)
        return statistics.median(own / other for own, other in pairs)


def speedups(found: Sequence[Measured]) -> str:
    """Of shardemb over each rival in the same precision, and by default over each by default."""
    (own, _), (own_bf16, _) = [(i, way) for i, way in enumerate(WAYS) if way.make is ours]
    lines = ["| model | ranks | rival | in fp32 | in bf16 | by default |"]
    lines += ["|---|---:|---|---:|---:|---:|"]
    for each in found:
        for rival in ("TorchRec", "TorchRec, pipelined", "DDP"):
            at = {way.precision: i for i, way in enumerate(WAYS) if way.name == rival}
            bf16 = f"{each.speedup(own_bf16, at['bf16']):.2f}" if "bf16" in at else "-"
            cells = [each.model, each.ranks, rival, f"{each.speedup(own, at['fp32']):.2f}", bf16]
            default = own_bf16 if has_bf16(CPU) else own
            cells.append(f"{each.speedup(default, at['fp32']):.2f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def table(rows: Sequence[Measured]) -> str:
    lines = ["| model | ranks | way | dense part | samples/s | of shardemb's | lowest, highest |"]
    lines += ["|---|---:|---|---|---:|---:|---:|"]
    for each in rows:
        own = {way.precision: i for i, way in enumerate(WAYS) if way.make is ours}
        for i, (way, rates) in enumerate(zip(WAYS, each.rates, strict=True)):
            cells = (
                f"{statistics.median(rates):,.0f} | {each.speedup(i, own[way.precision]):.2f} | "
            )
            cells += f"{min(rates):,.0f}, {max(rates):,.0f}"
            lines.append(
                f"| {each.model} | {each.ranks} | {way.name} | {way.precision} | {cells} |"
            )
    return "\n".join(lines)


def main(
    path: Annotated[Path, typer.Argument(metavar="TABLES", help="MLPerf's table list")],
    models: Annotated[str, typer.Option(metavar="NAME,...")] = "dlrm,dcn_v2",
    ranks: Annotated[str, typer.Option(metavar="N,...")] = "1,2",
    markdown_path: Annotated[Path | None, typer.Option("--markdown")] = None,
) -> None:
    found = []
    for model in models.split(","):
        for number in map(int, ranks.split(",")):
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "found.json"
                arguments = ["-m", "benchmarks.step_throughput", "work", model, str(path)]
                run_workers([*arguments, str(out)], number)
                found.append(Measured(model, number, json.loads(out.read_text())))
            print(table(found[-1:]), file=sys.stderr)  # the others take minutes more
    heading = (
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, torchrec {version('torchrec')}; {BATCH_SIZE} rows a rank; medians "
        f"of {TURNS} turns of {TURN} steps, ratios turn by turn. By default the dense part of "
        f"shardemb is in {'bf16' if has_bf16(CPU) else 'fp32'} here, that of TorchRec and DDP in "
        "fp32."
    )
    parts = ["# Training steps", heading, speedups(found), "## Samples a second", table(found)]
    text = "\n\n".join(parts) + "\n"
    if markdown_path:
        markdown_path.write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        typer.run(main)
