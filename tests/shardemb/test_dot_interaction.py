"""The dot interaction, next to TorchRec's."""

from __future__ import annotations

import pytest
import torch
from torchrec import KeyedTensor
from torchrec.models.dlrm import InteractionArch

from shardemb.models.dot_interaction import DotInteraction


def names(features: int) -> list[str]:
    return [f"f{i}" for i in range(features)]


@pytest.mark.parametrize("features", [1, 2, 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchrec_s(features: int, dtype: torch.dtype) -> None:
    """Outputs in the same order and gradients, in whatever order the embeddings come, also where
    autocast computes in bf16."""
    generator = torch.Generator().manual_seed(features)
    dense = torch.randn(9, 8, generator=generator)
    sparse = torch.randn(9, features, 8, generator=generator)
    module = DotInteraction(names(features))

    def ours(dense: torch.Tensor, sparse: torch.Tensor, order: list[int]) -> torch.Tensor:
        values = sparse[:, order].flatten(1)
        keys = [names(features)[i] for i in order]
        return module(dense, KeyedTensor(keys, [8] * features, values))

    theirs = InteractionArch(features)
    orders = [torch.randperm(features, generator=generator).tolist() for _ in range(2)]
    found = []
    for order in [None, list(range(features)), *orders]:
        inputs = [dense.clone().requires_grad_(), sparse.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = theirs(*inputs) if order is None else ours(*inputs, order)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        (output.float() * weights).sum().backward()
        found.append([output.float(), *(each.grad for each in inputs)])
    rtol = 1e-5 if dtype == torch.float32 else 3e-2
    for expected, *others in zip(*found, strict=True):
        for other in others:
            assert other.dtype == expected.dtype
            torch.testing.assert_close(other, expected, rtol=rtol, atol=rtol)


def test_gradients_are_right() -> None:
    """By finite differences."""
    module = DotInteraction(names(4))

    def interact(dense: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return module(dense, KeyedTensor(names(4)[::-1], [3] * 4, values))

    inputs = [torch.randn(2, width, dtype=torch.float64, requires_grad=True) for width in (3, 12)]
    assert torch.autograd.gradcheck(interact, inputs)
