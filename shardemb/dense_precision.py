"""In how many bits the dense part computes where the config leaves it open."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchrec.optim.keyed import CombinedOptimizer

from shardemb.optim import DENSE, parts_named

# Rows of a step x dense weights. With ten times less, conversions cost what products save on a CPU;
# from here on a forward and backward take 0.5 to 0.65 of their time (DLRM, one core with
# AVX512-BF16, 128 to 2,048 rows a rank).
ENOUGH_PRODUCTS = 1e8


def bf16_pays(optimizer: CombinedOptimizer, rows: int, device: torch.device) -> bool:
    """Whether all ranks multiply in bf16 and a step of `rows` over all ranks multiplies enough.

    A collective. By the rows of all ranks, so that a run that goes on with other ranks but the same
    global batch computes as before.
    """
    dense = [p for part in parts_named(DENSE, optimizer) for p in part.params.values()]
    weights = sum(p.numel() for p in dense if p.dim() > 1)
    pays = torch.tensor(has_bf16(device) and rows * weights >= ENOUGH_PRODUCTS, device=device).int()
    dist.all_reduce(pays, op=dist.ReduceOp.MIN)
    return bool(pays)


def has_bf16(device: torch.device) -> bool:
    """Whether products of bf16 are done by instructions of their own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch 2.11 does not tell.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(present for name, present in capabilities.items() if name.endswith("bf16"))
