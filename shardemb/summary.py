"""A run's result in a few lines."""

from __future__ import annotations

from typing import Any

from shardemb.config import RunConfig
from shardemb.data.dataset import read_info
from shardemb.metrics.stragglers import Straggler

# Of seconds that need one.
_REMARKS = {"communication": " (estimated: the share of embedding exchanges in the steps timed)"}


def summarize(config: RunConfig, result: dict[str, Any]) -> str:
    """What a user wants to know at the end of a run, next to what he could have reached."""
    speed = result["samples_per_second"]
    shown = "" if speed is None else f", {speed:,.0f} samples/s"
    if result.get("dense_precision") == "bf16":
        shown += ", dense part in bf16"
    lines = [f"trained {result['steps']} steps{shown}"]
    if result.get("embeddings"):
        lines.append(_summarize_embeddings(result["embeddings"]))
    if result.get("best"):
        lines.append(_summarize_best(config, result["best"]))
    if result["eval"]:
        lines.append(summarize_evaluation(config, result["eval"]))
    if result.get("seconds"):
        lines.append(_summarize_seconds(result["seconds"], result["restarts"]))
    if result.get("straggler"):
        lines.append(str(Straggler(**result["straggler"])))
    return "\n".join([*lines, f"run directory: {config.output}"])


def _summarize_embeddings(found: dict[str, Any]) -> str:
    predicted = found["predicted_step_ms"]
    expected = "" if predicted is None else f", predicted {predicted:.3g} ms"
    return f"embeddings {found['step_ms']:.3g} ms a step{expected}"


def _summarize_seconds(seconds: dict[str, float | None], restarts: int) -> str:
    shown = [
        f"{part.replace('_', ' ')} {spent:.1f}{_REMARKS.get(part, '')}"
        for part, spent in seconds.items()
        if part not in ("wall", "training") and spent is not None and round(spent, 1)
    ]
    again = f", restarted {restarts} times" if restarts else ""
    return f"{seconds['wall']:.1f} s in all: {', '.join(shown)}{again}"


def _summarize_best(config: RunConfig, best: dict[str, Any]) -> str:
    title, restored = config.best_metric.title, ", restored" if best["restored"] else ""
    return (
        f"best step {best['step']}: {config.evaluation.split} {title} {best['value']:.4f}{restored}"
    )


def summarize_evaluation(config: RunConfig, metrics: dict[str, Any], split: str = "test") -> str:
    """`metrics` by their keys, next to the AUC that could be reached on the test split."""
    info = read_info(config.data.dir) if split == "test" else None
    best = info.best_reachable if info else None
    shown = []
    for metric in config.metrics:
        if metric.key in metrics:
            is_reachable = best and metric.key == "auc" and metric.task.name == config.data.label
            reachable = f" (best reachable {best.auc:.4f})" if best and is_reachable else ""
            shown.append(f"{metric.title} {_shown(metrics[metric.key])}{reachable}")
    return f"{split} {', '.join(shown)}"


def _shown(metric: float | None) -> str:
    return "undefined" if metric is None else f"{metric:.4f}"
