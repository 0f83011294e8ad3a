"""Whether a checkpoint is of this model: all differences at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner import TableSpec, UserError
from shardemb.checkpoint.manifest import Manifest, TableEntry
from shardemb.checkpoint.state import dense_tensors

if TYPE_CHECKING:
    from shardemb.trainer import Trainer


def check_matches(
    manifest: Manifest, trainer: Trainer, path: str, *, weights_only: bool, grow_tables: bool
) -> None:
    """UserError lists what the model of `trainer` has otherwise than the checkpoint at `path`;
    with `grow_tables` its tables may have more rows."""
    specs = {spec.name: spec for spec in trainer.model.table_specs}
    lines = [
        *_tables(manifest, specs, weights_only, grow_tables),
        *_dense(manifest, trainer),
    ]
    here = trainer.dense_optimizer.name
    if manifest.dense_optimizer != here and not weights_only:
        lines.append(
            f"dense parameters: trained with {manifest.dense_optimizer}, and with {here} here "
            "(train.dense_optimizer.name)"
        )
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise UserError(f"the checkpoint {path} is not of this model:\n{listed}")


def _tables(
    manifest: Manifest, here: dict[str, TableSpec], weights_only: bool, grow_tables: bool
) -> list[str]:
    lines = [
        f"table {name}: not in the checkpoint" for name in here.keys() - manifest.tables.keys()
    ]
    lines += [
        f"table {name}: in the checkpoint, not in the model"
        for name in manifest.tables.keys() - here.keys()
    ]
    for name in here.keys() & manifest.tables.keys():
        saved, spec = manifest.tables[name], here[name]
        fits, remedy = saved.num_embeddings == spec.num_embeddings, ""
        if saved.num_embeddings < spec.num_embeddings:
            fits, remedy = grow_tables, "; to add rows say checkpoint.grow_tables: true"
        elif not fits:
            remedy = f"; no row is dropped: raise tables.{name}.num_embeddings"
        if saved.embedding_dim != spec.embedding_dim:
            fits, remedy = False, ""
        if not fits:
            shapes = f"{_shape(saved)} in the checkpoint, {_shape(spec)} here"
            lines.append(f"table {name}: {shapes}{remedy}")
        if saved.optimizer != spec.optimizer and not weights_only:
            lines.append(
                f"table {name}: trained with {saved.optimizer}, and with {spec.optimizer} here "
                f"(train.table_optimizer.name, tables.{name}.optimizer.name)"
            )
    return sorted(lines)


def _shape(table: TableEntry | TableSpec) -> str:
    return f"{table.num_embeddings} rows of {table.embedding_dim}"


def _dense(manifest: Manifest, trainer: Trainer) -> list[str]:
    saved = {k: v.shape for k, v in manifest.tensors.items() if k.startswith("model/")}
    here = {
        key: list(value.shape)
        for key, value in dense_tensors(trainer.model, trainer.optimizer).items()
        if key.startswith("model/")
    }
    return [
        f"{key.removeprefix('model/')}: {_found(saved.get(key))} in the checkpoint, "
        f"{_found(here.get(key))} here"
        for key in sorted(saved.keys() | here.keys())
        if saved.get(key) != here.get(key)
    ]


def _found(shape: list[int] | None) -> str:
    return "absent" if shape is None else f"shape {shape}"
