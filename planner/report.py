"""A plan in the terminal: what it predicts, its devices and its tables.

What the HTML page says in the same words (`facts`, the formats) is here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.cost.stages import STAGES
from planner.plan import DevicePlan, Plan, TablePlan
from planner.topology import Topology

WIDTH = 100
MOST_DEVICES, SLOWEST, FULLEST = 16, 8, 4
MOST_TABLES = 40
LONGEST_NAME = 60
MOST_RANK_RANGES = 5
STAGE_NAMES = tuple(stage.removesuffix("_ms").replace("_", " ") for stage in STAGES)
STAGE_COLORS = ("blue", "bright_cyan", "red", "yellow")
# Told apart without colour too: by shade, or by sign where there is ASCII only.
SHADES, SIGNS = "█▓▒░", "#=+-"
MS_COLUMN = "ms on\nall ranks"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def print_plan(plan: Plan, console: Console) -> None:
    """The headline, the devices and the tables; of very many, the ones that matter most."""
    width = min(WIDTH, console.width)
    glyphs = SIGNS if console.options.ascii_only else SHADES
    for part in (_headline(plan), _devices(plan, width, glyphs), _tables(plan)):
        console.print(part, "", width=width)


def facts(plan: Plan) -> list[tuple[str, str]]:
    """(what, its value in words), the most important first; what is unknown is left out."""
    found = [
        ("predicted step", _predicted(plan)),
        ("slowest", _slowest_of_each_stage(plan)),
        ("balance", _balance(plan)),
        ("objective", _objective(plan)),
        ("cost model", _cost_model(plan)),
        ("topology", _topology(plan.topology)),
        ("tables", _tables_in_words(plan)),
        ("planned in", _seconds(plan)),
        ("fingerprint", plan.fingerprint),
    ]
    return [(what, value) for what, value in found if value]


def _predicted(plan: Plan) -> str:
    predicted = plan.predicted
    if predicted.step_ms is None:
        return ""
    text = f"{format_ms(predicted.step_ms)} ms in embedding tables"
    if predicted.bound_ms is not None:
        text += f"; no plan can take less than {format_ms(predicted.bound_ms)} ms"
    if predicted.gap_percent is not None:
        text += f" (gap {format_percent(predicted.gap_percent)})"
    return text


def _slowest_of_each_stage(plan: Plan) -> str:
    """What the objective `stages` adds up: where a step's time goes, and who keeps it there."""
    if not has_costs(plan):
        return ""
    words = []
    for stage, name in zip(STAGES, STAGE_NAMES, strict=True):
        slowest = max(plan.devices, key=lambda d: stage_ms(d, stage))
        words.append(f"{name} {format_ms(stage_ms(slowest, stage))} ms (rank {slowest.rank})")
    return ", ".join(words)


def _balance(plan: Plan) -> str:
    ratio = plan.predicted.max_over_mean
    return "" if ratio is None else f"the slowest device takes {ratio:.3f} x the mean"


def _objective(plan: Plan) -> str:
    meaning = {
        "stages": "stages: every stage of a step waits for its slowest device",
        "max_total": "max_total: a step takes the slowest device's total",
    }
    return meaning[plan.objective] if plan.objective else ""


def _cost_model(plan: Plan) -> str:
    rows = "" if plan.batch_size is None else f", {plan.batch_size:,} rows a step on each rank"
    return f"{plan.cost_model}{rows}" if plan.cost_model else ""


def _topology(topology: Topology) -> str:
    kind = f"{topology.hardware.kind} " if topology.hardware else ""
    devices = f"{topology.world_size:,} {kind}device{'s' * (topology.world_size > 1)}"
    if topology.num_hosts == 1:
        return f"{devices} on one host"
    return f"{devices}, {topology.local_world_size} on each of {topology.num_hosts:,} hosts"


def _tables_in_words(plan: Plan) -> str:
    shards = sum(len(table.shards) for table in plan.tables.values())
    memory = sum(table_bytes(table) for table in plan.tables.values())
    return f"{len(plan.tables):,} in {shards:,} shards, {format_bytes(memory)}"


def _seconds(plan: Plan) -> str:
    spent = plan.seconds.options + plan.seconds.cost + plan.seconds.search
    return f"{spent:.2f} s" if spent else ""


def has_costs(plan: Plan) -> bool:
    return all(device.total_ms is not None for device in plan.devices)


def stage_ms(device: DevicePlan, stage: str) -> float:
    """0 where it is unknown."""
    return getattr(device, stage) or 0.0


def table_ms(table: TablePlan) -> float | None:
    """What all shards of a table take, on all their devices together."""
    costs = [shard.cost_ms for shard in table.shards if shard.cost_ms is not None]
    return sum(costs) if len(costs) == len(table.shards) else None


def table_bytes(table: TablePlan) -> int:
    """What a table takes on its devices and hosts."""
    return sum(shard.memory_bytes + shard.host_memory_bytes for shard in table.shards)


def by_weight(plan: Plan) -> list[tuple[str, TablePlan]]:
    """The tables, the most expensive first; without costs the largest first."""
    return sorted(
        plan.tables.items(), key=lambda item: (-(table_ms(item[1]) or 0.0), -table_bytes(item[1]))
    )


def kernel_name(table: TablePlan) -> str:
    share = table.cache_load_factor
    return table.compute_kernel + ("" if share is None else f" {share:.0%}")


def format_ms(ms: float) -> str:
    return f"{ms:,.3f}" if ms < 100 else f"{ms:,.1f}"


def format_percent(percent: float) -> str:
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2f}%"


def format_bytes(count: int) -> str:
    size, unit = _scaled(count)
    return f"{size:,.1f} {unit}" if unit != "B" else f"{count} B"


def _scaled(count: int) -> tuple[float, str]:
    size = float(count)
    for unit in UNITS[:-1]:
        if size < 1024:
            return size, unit
        size /= 1024
    return size, UNITS[-1]


def compact_ranks(ranks: Iterable[int], topology: Topology, most: int | None = None) -> str:
    """`all`, `host 3`, `hosts 0-2` or `0-3, 8`; of more than `most` ranges the first."""
    unique, size = sorted(set(ranks)), topology.local_world_size
    if len(unique) == topology.world_size:
        return "all" if topology.world_size > 1 else "0"
    hosts = sorted({rank // size for rank in unique})
    if size > 1 and len(unique) == size * len(hosts):
        return f"host{'s' * (len(hosts) > 1)} {_in_ranges(hosts, most)}"
    return _in_ranges(unique, most)


def _in_ranges(numbers: Sequence[int], most: int | None) -> str:
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1]
    starts, ends = [0, *breaks], [*breaks, len(numbers)]
    ranges = [
        str(numbers[i]) if j == i + 1 else f"{numbers[i]}-{numbers[j - 1]}"
        for i, j in zip(starts, ends, strict=True)
    ]
    shown = ", ".join(ranges[:most])
    return shown if most is None or len(ranges) <= most else f"{shown}, ... ({len(numbers)})"


def _headline(plan: Plan) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for what, value in facts(plan):
        grid.add_row(what, Text(value, style="bold" if what == "predicted step" else ""))
    return grid


def _devices(plan: Plan, width: int, glyphs: str) -> Group:
    """Each device's stages and memory."""
    sections = _chosen_devices(plan)
    cut, costs = len(sections) > 1, has_costs(plan)
    table = text_table(
        [*([""] if cut else []), "rank", *(["stages"] if costs else [])],
        [*(["ms"] if costs else []), "memory"],
    )
    longest = max(stage_total(device) for device in plan.devices)
    for label, devices in sections:
        table.add_section()
        for number, device in enumerate(devices):
            which = [label if number == 0 else ""] if cut else []
            cost: list[RenderableType] = []
            if costs:
                bar = _stage_bar(device, longest, max(8, width - 60), glyphs)
                cost = [bar, format_ms(stage_total(device))]
            table.add_row(*which, str(device.rank), *cost, _memory(device, glyphs))
    legend = [_legend(glyphs)] if costs else []
    return Group(*legend, table, *([_range_of_devices(plan)] if cut else []), *_hosts(plan))


def text_table(columns: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """With columns of text, then columns of numbers."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        header_style="dim",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def stage_total(device: DevicePlan) -> float:
    return device.total_ms or 0.0


def _chosen_devices(plan: Plan) -> list[tuple[str, Sequence[DevicePlan]]]:
    """All devices, or of many the slowest, the fastest and the fullest."""
    if len(plan.devices) <= MOST_DEVICES:
        return [("", plan.devices)]
    fullest = sorted(plan.devices, key=lambda d: -d.memory_bytes)
    if not has_costs(plan):
        return [("fullest", fullest[: SLOWEST + FULLEST]), ("emptiest", fullest[-1:])]
    slowest = sorted(plan.devices, key=lambda d: -stage_total(d))
    return [
        ("slowest", slowest[:SLOWEST]), ("fastest", slowest[-1:]), ("fullest", fullest[:FULLEST]),
    ]  # fmt: skip


def _legend(glyphs: str) -> Text:
    parts = zip(glyphs, STAGE_COLORS, STAGE_NAMES, strict=True)
    return Text("  ").join(Text(f"{glyph} {name}", style=color) for glyph, color, name in parts)


def _stage_bar(device: DevicePlan, longest: float, width: int, glyphs: str) -> Text:
    """The stages on end; the slowest device's fill the width."""
    bar, end = Text(no_wrap=True), 0.0
    for stage, color, glyph in zip(STAGES, STAGE_COLORS, glyphs, strict=True):
        end += stage_ms(device, stage)
        cells = round(end / longest * width) - len(bar) if longest else 0
        bar.append(glyph * cells, style=color)
    return bar


def _memory(device: DevicePlan, glyphs: str, width: int = 10) -> Text:
    """What is used, as a bar and in numbers."""
    used, limit = device.memory_bytes, device.memory_limit_bytes
    if limit is None:
        return Text(format_bytes(used))
    cells = width if used >= limit else round(used / limit * width)
    empty = ("." if glyphs == SIGNS else "·") * (width - cells)
    bar = Text(glyphs[0] * cells, style="red" if used > limit else "green") + Text(f"{empty} ")
    return _of_limit(used, limit) + Text(" ") + bar


def _of_limit(used: int, limit: int | None) -> Text:
    if limit is None:
        return Text(format_bytes(used))
    (some, unit), (most, unit_of_limit) = _scaled(used), _scaled(limit)
    first = f"{some:,.1f}" if unit == unit_of_limit else format_bytes(used)
    text = f"{first} of {most:,.1f} {unit_of_limit}"
    return Text(text) if used <= limit else Text(f"{text}, too much", style="red")


def _range_of_devices(plan: Plan) -> str:
    memory = [device.memory_bytes for device in plan.devices]
    text = f"\nAll {len(plan.devices):,} devices: "
    if has_costs(plan):
        times = [stage_total(device) for device in plan.devices]
        mean = sum(times) / len(times)
        text += f"{format_ms(min(times))} to {format_ms(max(times))} ms, mean {format_ms(mean)}; "
    over = sum(1 for d in plan.devices if d.memory_bytes > (d.memory_limit_bytes or d.memory_bytes))
    text += f"memory {format_bytes(min(memory))} to {format_bytes(max(memory))}"
    return text + (f"; {over:,} over their limit" if over else "")


def _hosts(plan: Plan) -> list[Text]:
    """The fullest host, where tables are in host memory at all."""
    fullest = max(plan.hosts, key=lambda host: host.memory_bytes, default=None)
    if fullest is None or not fullest.memory_bytes:
        return []
    used = _of_limit(fullest.memory_bytes, fullest.memory_limit_bytes)
    return [Text(f"Host memory: the fullest, host {fullest.host}, ") + used]


def _tables(plan: Plan) -> Group:
    """Each table, or of many the most expensive and a summary of all."""
    ordered = by_weight(plan)
    parts: list[RenderableType] = [_list_of_tables(plan, ordered[:MOST_TABLES])]
    if len(ordered) > MOST_TABLES:
        first = "most expensive" if has_costs(plan) else "largest"
        parts.append(f"\nThese are the {MOST_TABLES} {first} of {len(ordered):,} tables. All:\n")
        parts.append(_by_type_and_kernel(plan))
    return Group(*parts)


def _list_of_tables(plan: Plan, tables: Sequence[tuple[str, TablePlan]]) -> Table:
    costs = has_costs(plan)
    shown = text_table([], [])
    shown.add_column("table", overflow="fold", min_width=12)
    for column in ("sharding", "kernel", "ranks"):
        shown.add_column(column, no_wrap=column != "ranks")
    for column in ("shards", "memory", *([MS_COLUMN] if costs else [])):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, table in tables:
        ranks = compact_ranks((s.rank for s in table.shards), plan.topology, MOST_RANK_RANGES)
        kind = (table.sharding_type, kernel_name(table), ranks, f"{len(table.shards):,}")
        cost = [format_ms(table_ms(table) or 0.0)] if costs else []
        shown.add_row(printable(name), *kind, format_bytes(table_bytes(table)), *cost)
    return shown


def printable(name: str) -> Text:
    """As it is, not as rich's markup; without what would move the cursor."""
    plain = "".join(c if c.isprintable() else "?" for c in name)
    half = LONGEST_NAME // 2
    return Text(plain if len(plain) <= LONGEST_NAME else f"{plain[:half]}...{plain[-half:]}")


def summarize(plan: Plan) -> list[tuple[str, str, int, int, float]]:
    """(sharding type, kernel, tables, bytes, ms) of all tables, the most expensive first."""
    groups: dict[tuple[str, str], list[TablePlan]] = {}
    for table in plan.tables.values():
        groups.setdefault((table.sharding_type, table.compute_kernel), []).append(table)
    rows = [
        (*key, len(t), sum(map(table_bytes, t)), sum(table_ms(table) or 0.0 for table in t))
        for key, t in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row[4], -row[3]))


def _by_type_and_kernel(plan: Plan) -> Table:
    costs = has_costs(plan)
    numbers = ["tables", "memory", *([MS_COLUMN] if costs else [])]
    shown = text_table(["sharding", "kernel"], numbers)
    for sharding_type, kernel, count, memory, ms in summarize(plan):
        cost = [format_ms(ms)] if costs else []
        shown.add_row(sharding_type, kernel, f"{count:,}", format_bytes(memory), *cost)
    return shown
