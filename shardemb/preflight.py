"""Mistakes in a run that can be told before workers start. Imports no torch."""

from __future__ import annotations

from planner import Topology
from shardemb.config import RunConfig
from shardemb.data.dataset import read_info
from shardemb.data.footers import read_windows
from shardemb.data.ids import check_vocabularies
from shardemb.data.pretrained import pretrained_tables
from shardemb.data.schema import BatchSchema
from shardemb.data.sources import parquet_files
from shardemb.metrics.exported import refuse_unavailable
from shardemb.planning import plan_run
from shardemb.run_directory import check_output
from shardemb.sharding.limits import refuse_unsendable, refuse_unsupported


def check_run(config: RunConfig, topology: Topology) -> None:
    """Raise a UserError where plan, data files or run directory cannot be as `config` says."""
    known_device = None if config.launch.device == "auto" else config.launch.device
    refuse_unsupported(plan_run(config, topology), config.table_specs(), known_device)
    refuse_unsendable(config.train.communication, known_device)
    check_output(config.output)
    if config.launch.metrics_port is not None:
        refuse_unavailable()
    read_info(config.data.dir)
    schema = BatchSchema.from_config(config)
    check_vocabularies(schema)
    for table in pretrained_tables(config):
        table.check()
    for split in config.splits():
        read_windows(parquet_files(config.data.split(split)), schema)
