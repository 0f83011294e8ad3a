"""Adam of rows is PyTorch's, of the rows that are looked up."""

from __future__ import annotations

import pytest
import torch

from shardemb.row_adam import ReplicatedRowAdam, RowAdam

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


@pytest.mark.parametrize("is_rowwise", [False, True])
def test_dense_gradients_change_their_rows_alike(is_rowwise: bool) -> None:
    """Rows with a gradient of zero are not touched."""
    weight = torch.randn(ROWS, DIM)
    parameter = torch.nn.Parameter(weight.clone())
    rule = RowAdam(0.1, (0.9, 0.999), 1e-8, 0.1, is_rowwise)
    optimizer, states = ReplicatedRowAdam([parameter], **vars(rule)), rule.new_states(weight)
    for step, gradient in enumerate(gradients(), start=1):
        rows = torch.tensor([step, 8])
        parameter.grad = torch.zeros(ROWS, DIM)
        parameter.grad[rows] = gradient[rows]
        rule.update(weight, states, rows, parameter.grad[rows], step)
        optimizer.step()
    assert torch.equal(parameter.detach(), weight)
