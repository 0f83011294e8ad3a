"""Rules of rows are PyTorch's optimizers, or the papers', of the rows that are looked up."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)

from shardemb.optim import kernel_arguments, row_rule
from shardemb.optimizer_config import WITH_DECAY, TableOptimizerConfig
from shardemb.row_rules import ReplicatedRows, RowAdam, RowRule, RowWiseAdagradWithDecay

ROWS, DIM, STEPS = 9, 4, 6


def gradients(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, DIM, generator=generator) for _ in range(STEPS)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_all_rows_in_every_step_is_adamw(weight_decay: float) -> None:
    weight = torch.randn(ROWS, DIM)
    expected = weight.clone().requires_grad_()
    adamw = torch.optim.AdamW([expected], lr=0.1, betas=(0.8, 0.9), eps=1e-3,
                              weight_decay=weight_decay)  # fmt: skip
    rule = RowAdam(0.1, (0.8, 0.9), 1e-3, weight_decay, is_rowwise=False)
    states, rows = rule.new_states(weight), torch.arange(ROWS)
    for step, gradient in enumerate(gradients(), start=1):
        expected.grad = gradient
        adamw.step()
        rule.update(weight, states, rows, gradient, step)
    torch.testing.assert_close(weight, expected.detach(), rtol=1e-5, atol=1e-6)


def test_some_rows_is_sparse_adam() -> None:
    """Rows that no step looks up do not change, and their moments do not decay. (SparseAdam adds
    its eps elsewhere, so it is small here.)"""
    weight = torch.randn(ROWS, DIM)
    expected = weight.clone().requires_grad_()
    sparse = torch.optim.SparseAdam([expected], lr=0.1, eps=1e-12)
    rule = RowAdam(0.1, (0.9, 0.999), 1e-12, 0.0, is_rowwise=False)
    states = rule.new_states(weight)
    for step, gradient in enumerate(gradients(), start=1):
        rows = torch.tensor([step % ROWS, (step * 2) % 5])
        expected.grad = torch.sparse_coo_tensor(
            rows[None], gradient[rows], (ROWS, DIM), check_invariants=True
        )
        sparse.step()
        rule.update(weight, states, rows, gradient[rows], step)
    torch.testing.assert_close(weight, expected.detach(), rtol=1e-4, atol=1e-6)


def test_one_second_moment_a_row() -> None:
    """Computed by hand for one row: the mean of the squares over its columns."""
    rule = RowAdam(0.1, (0.5, 0.75), 0.0, 0.0, is_rowwise=True)
    weight = torch.zeros(2, 2)
    states = rule.new_states(weight)
    rule.update(weight, states, torch.tensor([1]), torch.tensor([[3.0, 1.0]]), 1)
    # m = [1.5, 0.5] / (1 - 0.5); v = 0.25 * (9 + 1) / 2 / (1 - 0.75) = 5
    expected = torch.tensor([[0.0, 0.0], [-0.1 * 3 / 5**0.5, -0.1 * 1 / 5**0.5]])
    torch.testing.assert_close(weight, expected)
    assert states["exp_avg_sq"].tolist() == [0.0, 1.25]


def test_lamb_scales_a_change_to_the_length_of_its_row() -> None:
    """By hand: Adam's first step is 1 for each element, and decay adds a half of the weight; the
    row is 5 long. A row of zeros stays; so does one without gradient and decay, and all is finite.
    """
    rule = RowAdam(0.1, (0.9, 0.999), 0.0, 0.5, is_rowwise=False, has_trust_ratio=True)
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    rule.update(weight, rule.new_states(weight), torch.arange(2), torch.ones(2, 2), 1)
    change = torch.tensor([2.5, 3.0])
    expected = torch.tensor([3.0, 4.0]) - 0.1 * 5 * change / change.norm()
    torch.testing.assert_close(weight, torch.stack([expected, torch.zeros(2)]))

    still = RowAdam(0.1, (0.9, 0.999), 1e-8, 0.0, is_rowwise=True, has_trust_ratio=True)
    weight = torch.tensor([[3.0, 4.0]])
    still.update(weight, still.new_states(weight), torch.tensor([0]), torch.zeros(1, 2), 1)
    assert weight.tolist() == [[3.0, 4.0]]


def test_rowwise_adagrad_with_decay() -> None:
    """By hand, for the one row that is looked up, twice."""
    rule = RowWiseAdagradWithDecay(0.1, 1.0, 0.5)
    weight = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    states = rule.new_states(weight)
    rule.update(weight, states, torch.tensor([1]), torch.tensor([[1.0, 7.0]]), 1)
    first = [1 - 0.1 * (1 / 6 + 0.5), 2 - 0.1 * (7 / 6 + 1)]  # the mean square is 25
    torch.testing.assert_close(weight, torch.tensor([[1.0, 2.0], first]))
    rule.update(weight, states, torch.tensor([1]), torch.tensor([[12.0, 12.0]]), 2)
    assert states["sum"].tolist() == [0.0, 169.0]
    second = [value - 0.1 * (12 / 14 + 0.5 * value) for value in first]
    torch.testing.assert_close(weight, torch.tensor([[1.0, 2.0], second]))


RULES = [
    RowAdam(0.1, (0.9, 0.999), 1e-8, 0.1, is_rowwise=False),
    RowAdam(0.1, (0.9, 0.999), 1e-8, 0.1, is_rowwise=True, has_trust_ratio=True),
    RowWiseAdagradWithDecay(0.1, 1e-8, 0.1),
]


@pytest.mark.parametrize("rule", RULES, ids=["adam", "partial_rowwise_lamb", "rowwise_adagrad"])
def test_dense_gradients_change_their_rows_alike(rule: RowRule) -> None:
    """Rows with a gradient of zero are not touched."""
    weight = torch.randn(ROWS, DIM)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer, states = ReplicatedRows([parameter], rule), rule.new_states(weight)
    for step, gradient in enumerate(gradients(), start=1):
        rows = torch.tensor([step, 8])
        parameter.grad = torch.zeros(ROWS, DIM)
        parameter.grad[rows] = gradient[rows]
        rule.update(weight, states, rows, parameter.grad[rows], step)
        optimizer.step()
    assert torch.equal(parameter.detach(), weight)


# What shardemb calls them, and FBGEMM.
TYPES = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
    "partial_rowwise_lamb": EmbOptimType.PARTIAL_ROWWISE_LAMB,
}


@pytest.mark.parametrize("name", TYPES)
def test_gpu_kernels_take_all_settings(name: str) -> None:
    """FBGEMM's kernel, built for a GPU on the meta device, has the rates and decay of the config;
    CPU kernels that would leave the decay out have a rule instead."""
    decay = 0.25 if name in WITH_DECAY else 0.0
    config = TableOptimizerConfig(
        name=name, lr=0.5, eps=0.125, betas=(0.75, 0.625), weight_decay=decay
    )
    arguments = kernel_arguments(config)
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(10, 8, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=TYPES[name],
        device=torch.device("meta"),
        learning_rate=arguments.pop("lr"),
        **arguments,
    )
    found = kernel.optimizer_args
    assert kernel.get_learning_rate() == 0.5
    assert name == "sgd" or found.eps == 0.125
    assert found.weight_decay == decay
    if "adam" in name or "lamb" in name:
        assert (found.beta1, found.beta2) == (0.75, 0.625)
    elif decay:
        assert found.weight_decay_mode == WeightDecayMode.DECOUPLE.value
    assert (row_rule(config) is not None) == (name in WITH_DECAY)
