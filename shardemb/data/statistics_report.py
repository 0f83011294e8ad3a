"""Statistics of data in the terminal and as one HTML page: `statistics_page.html`, filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.page import write_page
from planner.report import printable, text_table
from planner.tables import REUSE_BATCH_SIZE
from shardemb.data.statistics_summary import DataStatistics, DenseStatistics, FeatureStatistics

TEMPLATE = Path(__file__).with_name("statistics_page.html")
MOST_NOTES = 10  # of one kind
# The share of a bin, from 0 to 1, as a sign; the second where there is ASCII only.
BARS, SIGNS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


def print_statistics(statistics: DataStatistics, console: Console) -> None:
    """The features, the dense columns, and what there is to know about both."""
    console.print(Text(headline(statistics)), "")
    if statistics.features:
        console.print(_features(statistics, SIGNS if console.options.ascii_only else BARS), "")
    if statistics.dense:
        console.print(_dense(statistics), "")
    for note in notes(statistics):
        console.print(Text(note, style="dim"))


def headline(statistics: DataStatistics) -> str:
    files = f"{len(statistics.files):,} file{'s' * (len(statistics.files) > 1)}"
    features, dense = len(statistics.features), len(statistics.dense)
    return f"{statistics.rows:,} rows of {files}: {features:,} sparse features, {dense:,} dense"


def _features(statistics: DataStatistics, glyphs: str) -> Table:
    features = statistics.features.values()
    extras = [extra for extra in _EXTRAS if any(extra[1](feature) for feature in features)]
    shown = text_table([], [])
    shown.add_column("feature", overflow="fold", min_width=8)
    shown.add_column("distinct\nids", justify="right", no_wrap=True)
    for name in ("pooling\nmean", "\np50", "\np99", "lookups of\ntop 1%", "\ntop 10%"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("reuse:\n1 .. >32,768", no_wrap=True)
    for name, _ in extras:
        shown.add_column(name, justify="right", no_wrap=True)
    for name, feature in statistics.features.items():
        values = [Text(text(feature)) for _, text in extras]
        shown.add_row(printable(name), *_values(feature, glyphs), *values)
    return shown


def _values(feature: FeatureStatistics, glyphs: str) -> list[str]:
    return [
        distinct(feature),
        f"{feature.pooling_factor:,.2f}",
        f"{feature.pooling_p50:,}",
        f"{feature.pooling_p99:,}",
        percent(feature.top_1_percent),
        percent(feature.top_10_percent),
        _bars(feature.reuse_histogram, glyphs),
    ]


def distinct(feature: FeatureStatistics) -> str:
    return f"{'' if feature.is_exact else '~'}{feature.distinct_ids:,}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _bars(shares: list[float] | None, glyphs: str) -> str:
    """A sign for each bin; any lookups at all are seen."""
    highest = len(glyphs) - 1
    return "".join(
        glyphs[min(highest, int(share * highest) + (share > 0))] for share in shares or ()
    )


def _collisions(feature: FeatureStatistics) -> str:
    found = feature.collisions
    if found is None:
        return ""
    measured = found.measured_share
    return percent(measured) if measured is not None else f"~{percent(found.expected_share)}"


def _unless_0(count: int) -> str:
    return f"{count:,}" if count else ""


# Columns that are shown where any feature has a value.
_EXTRAS: tuple[tuple[str, Callable[[FeatureStatistics], str]], ...] = (
    ("nulls", lambda f: _unless_0(f.nulls)),
    ("out of\nrange", lambda f: _unless_0(f.out_of_range)),
    ("col-\nlide", _collisions),
)


def _dense(statistics: DataStatistics) -> Table:
    shown = text_table([], [])
    shown.add_column("dense", overflow="fold", min_width=8)
    for name in ("nulls", "NaN", "infinite", "min", "mean", "max", "std"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, column in statistics.dense.items():
        counts = (column.nulls, column.nans, column.infinite)
        shown.add_row(printable(name), *(f"{count:,}" for count in counts), *_moments(column))
    return shown


def _moments(column: DenseStatistics) -> list[str]:
    values = (column.min, column.mean, column.max, column.std)
    return ["" if value is None else f"{value:,.4g}" for value in values]


def notes(statistics: DataStatistics) -> list[str]:
    """What a reader of the numbers has to know, and what is wrong with the data."""
    found = [_reuse_note(statistics)] if statistics.features else []
    found += _sample_note(statistics)
    outside = [(name, f) for name, f in statistics.features.items() if f.out_of_range]
    found += [_out_of_range_note(name, feature) for name, feature in outside[:MOST_NOTES]]
    if len(outside) > MOST_NOTES:
        found.append(f"... and {len(outside) - MOST_NOTES:,} more features with ids out of range")
    if any(feature.collisions for feature in statistics.features.values()):
        found.append("collide: distinct ids that are hashed to a row with another; ~: predicted")
    if statistics.skipped:
        skipped = ", ".join(f"{name} ({kind})" for name, kind in statistics.skipped.items())
        found.append(f"not counted, of no type to train on: {skipped}")
    return found


def _reuse_note(statistics: DataStatistics) -> str:
    size = statistics.batch_size
    if not statistics.batches:
        return (
            f"reuse: {statistics.rows:,} rows are less than one batch of {size:,}, so how often "
            "rows occur in one is not known; give more data, or a smaller --batch-size to look at"
        )
    batches = f"{statistics.batches:,} batch{'es' * (statistics.batches > 1)}"
    text = (
        "reuse: share of lookups whose row occurs 1, 2, 3-4, 5-8, ... times in a batch, in "
        f"{batches} of {size:,} rows"
    )
    other = f"; the planner's histograms are of {REUSE_BATCH_SIZE:,}"
    return text + (other if size != REUSE_BATCH_SIZE else "")


def _sample_note(statistics: DataStatistics) -> list[str]:
    errors = [f.distinct_ids_relative_error for f in statistics.features.values() if not f.is_exact]
    if not errors:
        return []
    return [
        "~: estimated from a uniform sample of the ids, by hash; the standard error of distinct "
        f"ids is {max(errors):.2%} of them, and that of shares of lookups about as much"
    ]


def _out_of_range_note(name: str, feature: FeatureStatistics) -> str:
    if feature.num_embeddings is None:
        remedy = f"hash them into their table with data.features.{name}.ids: hash"
        return f"{name}: {feature.out_of_range:,} ids are negative; {remedy}"
    return (
        f"{name}: {feature.out_of_range:,} ids are not in 0 to {feature.num_embeddings - 1:,} (the "
        f"largest is {feature.largest_id:,}); raise num_embeddings of its tables, or set "
        f"data.features.{name}.ids: hash"
    )


def write_statistics_html(statistics: DataStatistics, path: Path) -> None:
    """Write the page `path`, whole or not at all."""
    write_page(TEMPLATE, _content(statistics), path)


def _content(statistics: DataStatistics) -> dict[str, Any]:
    document = statistics.to_dict()
    return {
        "headline": headline(statistics),
        "notes": notes(statistics),
        "features": [{"name": name, **f} for name, f in document["features"].items()],
        "dense": [{"name": name, **column} for name, column in document["dense"].items()],
    }
