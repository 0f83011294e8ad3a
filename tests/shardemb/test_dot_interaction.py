"""The dot interaction, next to TorchRec's."""

from __future__ import annotations

import pytest
import torch
from torchrec.models.dlrm import InteractionArch

from shardemb.models.dot_interaction import DotInteraction


@pytest.mark.parametrize("features", [1, 2, 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchrec_s(features: int, dtype: torch.dtype) -> None:
    """Outputs in the same order and gradients, also where autocast computes in bf16."""
    generator = torch.Generator().manual_seed(features)
    dense = torch.randn(9, 8, generator=generator)
    sparse = torch.randn(9, features, 8, generator=generator)
    found = []
    for module in (DotInteraction(features), InteractionArch(features)):
        inputs = [dense.clone().requires_grad_(), sparse.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = module(*inputs)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        (output.float() * weights).sum().backward()
        found.append([output.float(), *(each.grad for each in inputs)])
    rtol = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def test_gradients_are_right() -> None:
    """By finite differences."""
    inputs = [torch.randn(2, *size, 3, dtype=torch.float64) for size in ((), (4,))]
    for each in inputs:
        each.requires_grad_()
    assert torch.autograd.gradcheck(DotInteraction(4), inputs)
