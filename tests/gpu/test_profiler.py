"""What is measured on a CPU is measured on CUDA devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planner import TableSpec
from shardemb.profiler.environment import this_environment
from shardemb.profiler.kernels import time_copy, time_kernel, time_matmul
from shardemb.profiler.workloads import DenseMatmul, HostCopy, KernelSet
from tests.gpu.conftest import Place


def test_kernels_are_timed(place: Place) -> None:
    """A thousand times the lookups take longer, forward and backward."""
    table = TableSpec(name="t", num_embeddings=10_000, embedding_dim=64, pooling_factor=10)
    device, generator = torch.device(place.device), np.random.default_rng(0)
    small, large = (time_kernel(KernelSet(0, (table,), n), device, generator) for n in (20, 20_000))
    assert 0 < small.forward.median_ms < large.forward.median_ms
    assert 0 < small.backward.median_ms < large.backward.median_ms
    assert this_environment(device).device_type == place.device


@pytest.mark.gpu
def test_copies_and_products_are_timed() -> None:
    """Those of a GPU; a hundred times the bytes take longer."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    small, large = (time_copy(HostCopy(size), device) for size in (10**6, 10**8))
    assert 0 < small.median_ms < large.median_ms
    assert time_matmul(DenseMatmul((512, 512, 512)), device).median_ms > 0
