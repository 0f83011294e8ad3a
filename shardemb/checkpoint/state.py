"""All that training changes, as it lies in this rank's memory: tables, their optimizers' state,
dense parameters, their optimizers' state, random states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torchrec.optim import CombinedOptimizer

from planner import Shard, TablePlan
from shardemb.checkpoint.piece import WEIGHT, Piece
from shardemb.optim import DENSE, TABLES, parts_named, table_of
from shardemb.optimizer_config import ADAMS
from shardemb.sharding.initialize import local_blocks
from shardemb.sharding.kernels import kernels, set_step
from shardemb.sharding.shard_model import ShardedModel

# TorchRec's names of states that are not PyTorch's.
_ADAGRAD = {"momentum1": "sum"}
_ADAM = {"momentum1": "exp_avg", "momentum2": "exp_avg_sq"}


def table_pieces(model: ShardedModel, optimizer: CombinedOptimizer) -> list[Piece]:
    """What this rank holds of all tables and of their optimizer's state."""
    weights = list(weight_pieces(model))
    return [
        *weights,
        *_fused_states(model),
        *_states_of_own_updates(model, weights),
        *_replicated_states(model, optimizer),
    ]


def parameter_names(model: ShardedModel) -> dict[str, str]:
    """Tables, and what their weights are called in the state_dict of the unsharded model."""
    names = {table_of(name, model.planner_plan): name for name in model.state_dict()}
    return {table: name for table, name in names.items() if table is not None}


def weight_pieces(model: ShardedModel) -> Iterator[Piece]:
    """What this rank holds of all tables."""
    for name, value in model.state_dict().items():
        table = table_of(name, model.planner_plan)
        if table is None:
            continue
        is_replicated = model.planner_plan.tables[table].sharding_type == "data_parallel"
        for row, column, tensor in local_blocks(value):
            rows, columns = tensor.shape
            yield Piece(table, WEIGHT, row, rows, column, columns, tensor, is_replicated)


def _fused_states(model: ShardedModel) -> Iterator[Piece]:
    for name, states in model.fused_optimizer.state_dict()["state"].items():
        table = table_of(name, model.planner_plan)
        assert table is not None, name
        names = _ADAM if model.table_optimizers[table].name in ADAMS else _ADAGRAD
        shards = _local_shards(model.planner_plan.tables[table])
        for key, value in states.items():
            # By the plan: TorchRec lists the row-wise state of column shards one below the other.
            blocks = [shard.tensor for shard in value.local_shards()]
            state = key.rpartition(".")[2]
            for shard, tensor in zip(shards, blocks, strict=True):
                assert tensor.shape[0] == shard.rows and tensor.shape[1:] in ((), (shard.columns,))
                yield Piece(
                    table,
                    names.get(state, state),
                    shard.row_offset,
                    shard.rows,
                    shard.column_offset,
                    shard.columns,
                    tensor,
                )


def _states_of_own_updates(model: ShardedModel, weights: list[Piece]) -> Iterator[Piece]:
    """Of CPU kernels whose updates are ours: a shard's weights say which kernel's it is."""
    states = {
        weight.data_ptr(): state
        for updates in model.own_updates
        for weight, state in zip(updates.weights, updates.states, strict=True)
        if len(weight)
    }
    for piece in weights:
        if piece.rows:
            for name, tensor in states.get(piece.tensor.data_ptr(), {}).items():
                yield replace(piece, state=name, tensor=tensor)


def set_table_steps(
    model: ShardedModel, optimizer: CombinedOptimizer, steps: Mapping[str, int]
) -> None:
    """Have the optimizers of tables that count steps count on from those of each table."""
    for kernel in kernels(model):
        set_step(kernel.module, steps[kernel.tables[0]])
    for updates in model.own_updates:
        updates.steps = [steps[table] for table in updates.tables]
    for part in parts_named(TABLES, optimizer):
        for name, parameter in part.params.items():
            table = table_of(name, model.planner_plan)
            assert table is not None, name
            if "step" in part.state[parameter]:
                part.state[parameter]["step"].fill_(steps[table])


def _local_shards(table: TablePlan) -> list[Shard]:
    return [shard for shard in table.shards if shard.rank == dist.get_rank()]


def _replicated_states(model: ShardedModel, optimizer: CombinedOptimizer) -> Iterator[Piece]:
    """Of data_parallel tables, which PyTorch's optimizers update."""
    for part in parts_named(TABLES, optimizer):
        for name, parameter in part.params.items():
            table = table_of(name, model.planner_plan)
            assert table is not None, name
            for key, value in part.state[parameter].items():
                if value.dim() == 0:  # the count of steps is the run's
                    continue
                tensor = value[:, 0] if value.dim() == 2 and value.shape[1] == 1 else value
                rows, columns = parameter.shape
                yield Piece(table, key, 0, rows, 0, columns, tensor, is_replicated=True)


# --- All else


def dense_tensors(model: ShardedModel, optimizer: CombinedOptimizer) -> dict[str, torch.Tensor]:
    """`model/NAME` and `optimizer/NAME/STATE`: the same on every rank, not copied."""
    tensors = {f"model/{name}": value for name, value in _dense_parameters(model)}
    for part in parts_named(DENSE, optimizer):
        for name, parameter in part.params.items():
            for key, value in part.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def _dense_parameters(model: ShardedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model.state_dict().items():
        if table_of(name, model.planner_plan) is None:
            yield name, value


@torch.no_grad()
def set_dense(model: ShardedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Take over the parameters that `dense_tensors` gave; names and shapes are the model's."""
    for name, value in _dense_parameters(model):
        value.copy_(tensors[f"model/{name}"])


def set_dense_states(optimizer: CombinedOptimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Take over the optimizer's states that `dense_tensors` gave, of the same optimizer."""
    for part in parts_named(DENSE, optimizer):
        for name, parameter in part.params.items():
            prefix = f"optimizer/{name}/"
            part.state[parameter] = {
                # Counts of steps stay on the CPU, where PyTorch's optimizers make them.
                key.removeprefix(prefix): value.to(parameter.device) if value.dim() else value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }


# --- Random states


def random_tensors(device: torch.device) -> dict[str, torch.Tensor]:
    """`random/RANK/cpu` and, on a GPU, `random/RANK/cuda`."""
    prefix = f"random/{dist.get_rank()}"
    states = {f"{prefix}/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"{prefix}/cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random(device: torch.device, tensors: dict[str, torch.Tensor]) -> None:
    """Of the same rank before; a rank that was not there draws its own, from the first rank's."""
    own = f"random/{dist.get_rank()}"
    if f"{own}/cpu" not in tensors:
        torch.set_rng_state(tensors["random/0/cpu"])
        torch.manual_seed(torch.initial_seed() + dist.get_rank())
        return
    torch.set_rng_state(tensors[f"{own}/cpu"])
    if device.type == "cuda" and f"{own}/cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{own}/cuda"], device)
