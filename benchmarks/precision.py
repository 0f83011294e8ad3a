"""What lower precision costs and saves, next to fp32: AUC on real data, and time.

    shardemb data convert criteo day.tsv.gz data/criteo --test-rows 20000
    python -m benchmarks.precision data/criteo --markdown benchmarks/results/precision.md

AUC differences are between runs of the same seed. Steps are timed by the processor time of one
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
from typing import Annotated

if not __package__:  # started as a file: its own folder must not hide the package `planner`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "criteo.yaml"
BF16 = "train.precision.dense=bf16"
SWITCHES: dict[str, list[str]] = {
    "fp32": ["train.precision.dense=fp32"],
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
WARMUP_STEPS, STEPS = 4, 24


def auc(data: Path, folder: Path, seed: int, overrides: list[str]) -> float:
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
    return float(json.loads(done.stdout)["eval"]["auc"])


def runs(data: Path, seeds: int) -> Iterator[str]:
    found: dict[str, list[float]] = {switch: [] for switch in SWITCHES}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for switch, overrides in SWITCHES.items():
                output = Path(folder) / f"{switch}-{seed}".replace(" ", "-")
                found[switch].append(auc(data, output, seed, overrides))
                print(switch, seed, found[switch][-1], file=sys.stderr, flush=True)
    yield "| switch | AUC of each seed | largest difference to fp32 |"
    yield "| --- | --- | --- |"
    for switch, own in found.items():
        worst = max((a - b for a, b in zip(own, found["fp32"], strict=True)), key=abs)
        yield f"| {switch} | {', '.join(f'{value:.4f}' for value in own)} | {worst:+.5f} |"


def step_ms(data: Path, batch_size: int, ways: list[list[str]]) -> list[float]:
    """Processor time of a step of this process alone, in ms, the median of many: of a trainer for
    each of `ways`, which take turns, since other programs slow the memory."""
    import torch

    from shardemb.build import build_reader, build_trainer
    from shardemb.config import load_config

    common = [f"data.dir={data}", f"train.batch_size={batch_size}"]
    configs = [load_config(CONFIG, [*common, *overrides]) for overrides in ways]
    trainers = [build_trainer(config, torch.device("cpu")) for config in configs]
    times: list[list[float]] = []
    for batch, step in zip(
        build_reader(configs[0], "train").epoch(), range(WARMUP_STEPS + STEPS), strict=False
    ):
        own = [0.0] * len(trainers)
        for i in (range(len(own)), reversed(range(len(own))))[step % 2]:
            start = time.process_time()
            trainers[i].train_step(batch)
            own[i] = (time.process_time() - start) * 1e3
        times.append(own)
    return [median(own) for own in zip(*times[WARMUP_STEPS:], strict=True)]


def steps(data: Path) -> Iterator[str]:
    import torch

    from shardemb.ranks import process_group

    torch.set_num_threads(1)
    yield "| dense part | batch size | fp32, ms | bf16, ms | bf16 / fp32 |"
    yield "| --- | --- | --- | --- | --- |"
    with process_group("cpu"):
        for title, model in MODELS.items():
            for batch_size in BATCH_SIZES:
                plain, bf16 = step_ms(data, batch_size, [model, [*model, BF16]])
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
