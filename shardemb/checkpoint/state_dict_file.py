"""The state_dict of an unsharded model, in a file of safetensors or of torch.save."""

from __future__ import annotations

import mmap
import pickle
from pathlib import Path

import torch

from planner import UserError
from shardemb.checkpoint.tensor_file import DTYPES
from shardemb.data.vectors_matrix import safetensors_header


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by their names; the memory of those of safetensors is the file itself. UserError
    where it is damaged, or holds anything else: nothing in it is run."""
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--state-dict: cannot read {path} ({error.strerror or error})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise UserError(
            f"--state-dict: {path} is no safetensors file, and not one of torch.save with tensors "
            "alone: torch.save(model.state_dict(), path)"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        keys = f" with {', '.join(map(str, found))[:80]}" if isinstance(found, dict) else ""
        raise UserError(
            f"--state-dict: {path} holds a {type(found).__name__}{keys}, not tensors by their "
            "names: torch.save(model.state_dict(), path)"
        )
    return found


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        header, begin = safetensors_header(file, str(path))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        dtype, (start, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if begin + end > len(data):
            raise UserError(f"--state-dict: {path} is damaged: it ends in {name}")
        count, shape = (end - start) // dtype.itemsize, entry["shape"]
        tensors[name] = (
            torch.frombuffer(data, dtype=dtype, count=count, offset=begin + start).view(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
    return tensors
