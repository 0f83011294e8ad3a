"""Weights of other tools as a checkpoint that a run begins with: what export writes, back again."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import nn

from planner import Plan, RequestError, ShardingRule, TableSpec, Topology, UserError, plan_by_rule
from planner.files import replace_file
from shardemb.checkpoint.contents import Found
from shardemb.checkpoint.listing import LIST, list_of, read_names
from shardemb.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    PieceEntry,
    TableEntry,
    TensorEntry,
)
from shardemb.checkpoint.piece import WEIGHT, Piece
from shardemb.checkpoint.state_dict_file import read_state_dict
from shardemb.checkpoint.store import Store
from shardemb.checkpoint.tensor_file import write_tensors
from shardemb.config import RunConfig
from shardemb.data.pretrained import Pretrained
from shardemb.data.sources import matches_of
from shardemb.models import build_model
from shardemb.optim import table_of
from shardemb.pretrained_config import PretrainedConfig
from shardemb.run_directory import check_output
from shardemb.warm_start import fill_pieces

NAME = "step-00000000"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def import_weights(config: RunConfig, tables: str | None, state_dict: Path | None) -> Found:
    """The checkpoint, in the config's run directory, of step 0 and without optimizer states.

    `tables`: a folder or URL with TABLE.parquet (columns of ids and of vectors) or
    TABLE.safetensors (one matrix) for tables. `state_dict`: safetensors, or a .pt file that holds
    tensors alone, of the unsharded model, for all that `tables` does not have. With `tables` alone
    all else begins as in a new run. Takes memory for the largest table. UserError lists all that is
    missing or of another shape; nothing is left then.
    """
    if tables is None and state_dict is None:
        raise RequestError("name what to import: --tables FOLDER, --state-dict FILE, or both")
    _check_free(config)
    torch.manual_seed(config.seed)  # as a new run: what is not imported begins as there
    weights = _Weights(config, build_model(config), tables, state_dict)
    weights.check()
    store, is_new = Store(config.checkpoint_dir), not config.output.exists()
    try:
        manifest = weights.write(store)
        store.write(f"{NAME}/{MANIFEST}", [manifest.to_bytes()])
        if config.checkpoint.dir is None and not (config.output / "config.yaml").exists():
            replace_file(config.output / "config.yaml", config.to_yaml())
        store.write(LIST, [list_of([NAME], None)])
    except BaseException as error:
        store.delete_folder(NAME)
        if is_new:
            shutil.rmtree(config.output, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"cannot write {store.root} ({reason})") from error
        raise
    return Found(store, NAME, manifest)


def _check_free(config: RunConfig) -> None:
    if config.checkpoint.dir is None:
        check_output(config.output)
    names = read_names(Store(config.checkpoint_dir))
    if names:
        raise UserError(
            f"{config.checkpoint_dir} holds checkpoints already, the last is {names[-1]}; choose "
            "another place with output=DIR"
        )


class _Weights:
    """What a model needs, and where each part comes from."""

    def __init__(
        self, config: RunConfig, model: nn.Module, folder: str | None, state_dict: Path | None
    ) -> None:
        self._config, self._folder = config, folder
        self._specs: dict[str, TableSpec] = {spec.name: spec for spec in config.table_specs()}
        self._plan: Plan = plan_by_rule(
            list(self._specs.values()),
            Topology(world_size=1, local_world_size=1),
            ShardingRule(sharding_type="table_wise"),
        )
        state = model.state_dict()
        self._parameters = {t: name for name in state if (t := table_of(name, self._plan))}
        self._dense = {n: v for n, v in state.items() if n not in self._parameters.values()}
        self._given = {} if state_dict is None else read_state_dict(state_dict)
        self._is_dense_given = state_dict is not None
        self._files = dict(self._find_files(folder)) if folder else {}

    def _find_files(self, folder: str) -> Iterator[tuple[str, Pretrained]]:
        for name, spec in self._specs.items():
            paths = [f"{folder.rstrip('/')}/{name}{end}" for end in (".parquet", ".safetensors")]
            there = [path for path in paths if matches_of(path)]
            if len(there) > 1:
                raise UserError(f"--tables: there are {there[0]} and {there[1]}; remove one")
            if there:
                shape, source = (spec.num_embeddings, spec.embedding_dim), there[0]
                config = PretrainedConfig(path=source)
                yield name, Pretrained(name, *shape, config, option="--tables")

    def check(self) -> None:
        """UserError lists what is missing, superfluous or of another shape."""
        lines = [line for name in self._specs for line in self._table_lines(name)]
        if self._is_dense_given:
            for name, value in self._dense.items():
                lines += _shape_lines(name, value.shape, self._given.get(name))
            known = {*self._dense, *self._parameters.values()}
            lines += [f"{name}: not in the model" for name in self._given if name not in known]
        if lines:
            listed = "\n".join(f"  {line}" for line in lines)
            raise UserError(f"what is to be imported is not of this model:\n{listed}")

    def _table_lines(self, name: str) -> list[str]:
        spec = self._specs[name]
        shape = torch.Size([spec.num_embeddings, spec.embedding_dim])
        if name not in self._files:
            parameter = self._parameters[name]
            if self._is_dense_given:
                return _shape_lines(parameter, shape, self._given.get(parameter))
            return [f"table {name}: there is no {self._folder}/{name}.parquet or .safetensors"]
        try:
            found = self._files[name].shape()
        except UserError as error:
            return [str(error)]
        return [] if found == tuple(shape) else [f"table {name}: {_differ(found, shape)}"]

    def write(self, store: Store) -> Manifest:
        files: dict[str, FileEntry] = {}
        pieces: list[PieceEntry] = []
        for number, (name, spec) in enumerate(self._specs.items()):
            file, key = f"{NAME}/table-{number:05d}.safetensors", f"{name}/{WEIGHT}/0-0"
            files[file], entries = write_tensors(store, file, {key: self._table(spec)})
            rows, columns = spec.num_embeddings, spec.embedding_dim
            where = {"row": 0, "rows": rows, "column": 0, "columns": columns}
            entry = entries[key].model_dump()
            pieces.append(PieceEntry(**entry, table=name, state=WEIGHT, **where))
        dense = f"{NAME}/dense.safetensors"
        files[dense], tensors = write_tensors(store, dense, dict(self._dense_values()))
        return self._manifest(files, pieces, tensors)

    def _table(self, spec: TableSpec) -> torch.Tensor:
        dtype = _DTYPES[spec.dtype]
        if spec.name not in self._files:
            return self._given[self._parameters[spec.name]].to(dtype)
        rows, columns = spec.num_embeddings, spec.embedding_dim
        tensor = torch.empty(rows, columns, dtype=dtype)
        piece = Piece(spec.name, WEIGHT, 0, rows, 0, columns, tensor)
        filled = fill_pieces([piece], self._files[spec.name])
        assert filled.rows == rows, "as many vectors as rows, and no row twice"
        return tensor

    def _dense_values(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self._dense.items():
            given = self._given[name] if self._is_dense_given else value
            yield f"model/{name}", given.to(value.dtype).contiguous()

    def _manifest(
        self,
        files: dict[str, FileEntry],
        pieces: list[PieceEntry],
        tensors: dict[str, TensorEntry],
    ) -> Manifest:
        return Manifest(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            step=0,
            samples=0,
            world_size=1,
            plan=self._plan.model_dump(mode="json"),
            loader=None,
            tables={
                name: TableEntry(
                    num_embeddings=spec.num_embeddings,
                    embedding_dim=spec.embedding_dim,
                    dtype=spec.dtype,
                    optimizer=spec.optimizer,
                    parameter=self._parameters[name],
                )
                for name, spec in self._specs.items()
            },
            dense_optimizer=self._config.train.dense_optimizer.name,
            weights_only=True,
            pieces=pieces,
            tensors=tensors,
            files=files,
        )


def _shape_lines(name: str, shape: torch.Size, given: torch.Tensor | None) -> list[str]:
    if given is None:
        return [f"{name}: missing"]
    return [] if given.shape == shape else [f"{name}: {_differ(given.shape, shape)}"]


def _differ(found: Iterable[int | None], here: torch.Size) -> str:
    return f"shape {list(found)} in the file, {list(here)} in the model"
