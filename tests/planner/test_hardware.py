from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from planner.errors import RequestError
from planner.hardware import PRESETS, Hardware, preset


def _fields(**changed: Any) -> dict[str, Any]:
    return {**preset("H100").model_dump(), **changed}


def test_torchrec_bandwidths_are_torchrecs():
    """The preset's GB/s, in bytes a millisecond, are TorchRec's defaults to float precision."""
    from torchrec.distributed.planner import constants

    ours = preset("torchrec-80GB")
    for gb_s, bytes_per_ms in [
        (ours.device_bandwidth_gb_s, constants.HBM_MEM_BW),
        (ours.host_link_bandwidth_gb_s, constants.HBM_TO_DDR_MEM_BW),
        (ours.intra_host_bandwidth_gb_s, constants.INTRA_NODE_BANDWIDTH),
        (ours.inter_host_bandwidth_gb_s, constants.CROSS_NODE_BANDWIDTH),
    ]:
        assert gb_s * 1e6 == pytest.approx(bytes_per_ms, rel=1e-15)
    assert ours.host_memory_bytes == constants.DDR_CAP
    assert ours.device_memory_bytes == 80 * 2**30


@pytest.mark.parametrize("kind", PRESETS)
def test_presets_are_valid_and_plausible(kind: str):
    """Each is what its own checks accept, and nearer memory is not slower than farther."""
    hardware = PRESETS[kind]
    assert Hardware.model_validate_json(hardware.model_dump_json()) == hardware
    assert hardware.kind == kind
    assert (hardware.device_cache_bandwidth_gb_s or 1e9) > hardware.device_bandwidth_gb_s
    assert hardware.device_bandwidth_gb_s >= hardware.host_link_bandwidth_gb_s
    assert hardware.intra_host_bandwidth_gb_s >= hardware.inter_host_bandwidth_gb_s
    assert hardware.intra_host_latency_us <= hardware.inter_host_latency_us


@pytest.mark.parametrize("name", ["A100-80GB", "a100-80gb", "A100-80gb"])
def test_kinds_are_found_in_any_case(name: str):
    """Case does not matter; the result has the kind's own spelling."""
    assert preset(name).kind == "A100-80GB"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("A100-80", "A100-80GB"), ("v100", "H100"), ("H100-80GB", "A100-80GB"), ("l40", "L40S")],
)
def test_an_unknown_kind(name: str, nearest: str):
    """The message repeats it, names the nearest kind and lists all."""
    with pytest.raises(RequestError) as caught:
        preset(name)
    message = str(caught.value)
    assert f"no hardware kind '{name}'; did you mean {nearest}?" in message
    assert all(kind in message for kind in PRESETS)


def test_an_unknown_kind_like_none():
    """What resembles no kind is told without a guess."""
    with pytest.raises(RequestError, match=re.escape("'?'. Known are torchrec-80GB, ")):
        preset("?")


@pytest.mark.parametrize(
    ("size", "expected"),
    [("80GiB", 80 * 2**30), ("80 gib", 80 * 2**30), ("80GB", 80 * 10**9), (1024, 1024)],
)
def test_sizes_as_people_write_them(size: Any, expected: int):
    """GiB is binary, GB decimal, a number is bytes; JSON has bytes."""
    hardware = Hardware.model_validate(_fields(device_memory_bytes=size))
    assert hardware.device_memory_bytes == expected
    assert hardware.model_dump(mode="json")["device_memory_bytes"] == expected


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("kind", ["", 5]),
        ("device_memory_bytes", [0, -1, "80 XB", "much", True, float("nan"), 2**63]),
        ("host_memory_bytes", [-1, None]),
        ("device_cache_bandwidth_gb_s", [0]),
        ("device_bandwidth_gb_s", [0, -5, float("inf"), float("nan"), "100", True]),
        ("inter_host_bandwidth_gb_s", [0]),
        ("kernel_launch_us", [-1]),
        ("gather_efficiency", [0, 1.01]),
        ("collective_efficiency", [0, 1.01]),
        ("reserved_memory_fraction", [-0.1, 1]),
        ("dense_tflops", [0]),
        ("device_bandwith_gb_s", [1]),
    ],
)
def test_values_that_are_refused(field: str, values: list[Any]):
    """Zero, negative and infinite numbers where they make no sense, other types, unknown fields."""
    for value in values:
        with pytest.raises(ValidationError) as caught:
            Hardware.model_validate(_fields(**{field: value}))
        assert [error["loc"] for error in caught.value.errors()] == [(field,)]
