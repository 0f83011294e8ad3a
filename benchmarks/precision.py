"""What lower precision costs and saves, next to fp32: AUC on real data, and time.

    shardemb data convert criteo day.tsv.gz data/criteo --test-rows 20000
    python -m benchmarks.precision data/criteo --markdown benchmarks/results/precision.md

Each seed is trained with every switch in turn, so that what the machine does besides falls on all
alike; differences are between runs of the same seed. Steps are timed by the processor time of one
rank with one thread, which other programs do not add to.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

if not __package__:  # started as a file: its own folder must not hide the package `planner`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "criteo.yaml"
BF16 = "train.precision.dense=bf16"
SWITCHES: dict[str, list[str]] = {
    "fp32": [],
    "bf16 dense": [BF16],
    "fp16 communication": ["train.communication={forward: fp16, backward: fp16}"],
    "fp16 tables": ["tables.C{1..26}.dtype=fp16"],
}
MODELS: dict[str, list[str]] = {
    "over_layers [64], low_rank 16, as in the config": [],
    "over_layers [1024, 512], low_rank 128": [
        "model.args.over_layers=[1024, 512]",
        "model.args.low_rank=128",
    ],
}
BATCH_SIZES = (128, 512, 2048)
WARMUP_STEPS, STEPS = 3, 12


class Score(NamedTuple):
    auc: float
    samples_per_second: float


def train(data: Path, folder: Path, seed: int, overrides: list[str]) -> Score:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launch.cli", "train", str(CONFIG), f"data.dir={data}"),
            *(f"output={folder}", f"seed={seed}", "--json", *overrides),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return Score(result["eval"]["auc"], result["samples_per_second"])


def runs(data: Path, seeds: int) -> Iterator[str]:
    scores: dict[str, list[Score]] = {switch: [] for switch in SWITCHES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for switch, overrides in SWITCHES.items():
                output = Path(folder) / f"{switch}-{seed}".replace(" ", "-")
                scores[switch].append(train(data, output, seed, overrides))
                print(switch, seed, *scores[switch][-1], file=sys.stderr, flush=True)
    yield "| switch | AUC of each seed | largest difference to fp32 | samples/s |"
    yield "| --- | --- | --- | --- |"
    for switch, own in scores.items():
        pairs = zip(own, scores["fp32"], strict=True)
        worst = max((score.auc - plain.auc for score, plain in pairs), key=abs)
        aucs = ", ".join(f"{score.auc:.4f}" for score in own)
        speed = median(score.samples_per_second for score in own)
        yield f"| {switch} | {aucs} | {worst:+.5f} | {speed:,.0f} |"


def step_ms(data: Path, batch_size: int, overrides: list[str]) -> float:
    """Processor time of a step on this process alone, in ms: the median of several."""
    import torch

    from shardemb.build import build_reader, build_trainer
    from shardemb.config import load_config

    config = load_config(CONFIG, [f"data.dir={data}", f"train.batch_size={batch_size}", *overrides])
    trainer = build_trainer(config, torch.device("cpu"))
    batches, times = build_reader(config, "train").epoch(), []
    for batch, _ in zip(batches, range(WARMUP_STEPS + STEPS), strict=False):
        start = time.process_time()
        trainer.train_step(batch)
        times.append((time.process_time() - start) * 1e3)
    return median(times[WARMUP_STEPS:])


def steps(data: Path) -> Iterator[str]:
    import torch

    from shardemb.ranks import process_group

    torch.set_num_threads(1)
    yield "| dense part | batch size | fp32, ms | bf16, ms | bf16 / fp32 |"
    yield "| --- | --- | --- | --- | --- |"
    with process_group("cpu"):
        for title, model in MODELS.items():
            for batch_size in BATCH_SIZES:
                plain = step_ms(data, batch_size, model)
                bf16 = step_ms(data, batch_size, [*model, BF16])
                yield f"| {title} | {batch_size} | {plain:.1f} | {bf16:.1f} | {bf16 / plain:.2f} |"


def main(
    data: Annotated[Path, typer.Argument(help="a folder of `shardemb data convert criteo`")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this file")] = None,
) -> None:
    lines = [
        "# Precision: what it costs and saves",
        "",
        f"`python -m benchmarks.precision`, {platform.machine()} CPU ({os.cpu_count()} cores).",
        "",
        f"## configs/criteo.yaml on two ranks, {seeds} seeds",
        "",
        *runs(data.absolute(), seeds),
        "",
        "## Processor time of a training step, one rank, one thread",
        "",
        *steps(data.absolute()),
        "",
    ]
    print("\n".join(lines))
    if markdown:
        markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
