"""One device and what connects it: memory, bandwidths, latencies; and the kinds we know.

Each number of a known kind has its source beside it, `assumed` where there is none to cite.

Sources cited more than once:
- datasheet: NVIDIA's data sheet of the product. It counts both directions of a link, so a link's
  number here is half of it. Dense TFLOPS are half of those "with sparsity".
- DGX: NVIDIA's system of eight such GPUs, for the network and the host's memory.
- gpu-benches: measurements in github.com/te42kyfo/gpu-benches, gpu-l2-cache/*.txt.
- nccl-tests 212: a maintainer in github.com/NVIDIA/nccl-tests/issues/212: of 450 GB/s, protocols
  leave NCCL 370, thus 0.82.

Assumed for all GPUs: 5 us to launch a kernel; 20 and 40 us to start a collective in a host and
between hosts; half of the host's memory for tables. Reads of long streams reach 0.85 (A100), 0.81
(H200) and 0.92 (L40) of the nominal bandwidth (gpu-benches); random rows are assumed to lose
another tenth.
"""

from __future__ import annotations

import difflib
from types import MappingProxyType

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from planner.errors import RequestError
from planner.validation import shorten

_BYTES = 2**63  # beyond what a count of bytes can be


class Hardware(BaseModel):
    """A kind of device, all of a topology alike. GB are decimal: 1 GB/s is 1e6 bytes a ms.

    Sizes are numbers of bytes or texts such as "80GiB" (2^30 bytes each) and "80GB" (10^9).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    kind: str = Field(min_length=1, description="the name of this kind of device")
    device_memory_bytes: ByteSize = Field(
        gt=0, lt=_BYTES, description="memory of one device, as its driver reports it"
    )
    host_memory_bytes: ByteSize = Field(
        default=ByteSize(0),
        lt=_BYTES,
        description="memory of one host that tables may use; 0: no table is kept in host memory",
    )
    device_bandwidth_gb_s: float = Field(gt=0, description="device memory, nominal")
    device_cache_bytes: ByteSize = Field(
        default=ByteSize(0), lt=_BYTES, description="last-level cache of one device; 0: unknown"
    )
    device_cache_bandwidth_gb_s: float | None = Field(
        default=None, gt=0, description="reads that hit this cache; null: unknown"
    )
    host_link_bandwidth_gb_s: float = Field(
        gt=0, description="between one device and its host's memory, one direction"
    )
    intra_host_bandwidth_gb_s: float = Field(
        gt=0, description="one device to the others of its host, one direction"
    )
    inter_host_bandwidth_gb_s: float = Field(
        gt=0, description="one device's share of its host's network, one direction"
    )
    kernel_launch_us: float = Field(ge=0, description="start of one kernel")
    intra_host_latency_us: float = Field(ge=0, description="start of one collective in a host")
    inter_host_latency_us: float = Field(ge=0, description="start of one collective between hosts")
    gather_efficiency: float = Field(
        gt=0, le=1, description="share of the device bandwidth that reads of random rows reach"
    )
    collective_efficiency: float = Field(
        gt=0, le=1, description="share of the link bandwidths that collectives reach"
    )
    reserved_memory_fraction: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="share of the device memory kept free: framework, fragmentation, and "
        "activations that no table accounts for",
    )
    dense_tflops: float | None = Field(
        default=None, gt=0, description="dense layers, fp32 (TF32 where there is it); null: unknown"
    )

    @property
    def is_cpu(self) -> bool:
        """Whether a device is a process on a CPU, by the name of its kind."""
        return self.kind.casefold().startswith("cpu")


_GIB = 1024**3
_TORCHREC_GB_S = _GIB / 1e9  # TorchRec writes 600 * 1024^3 bytes a second for "600 GB/s"


def _gib(size: float) -> ByteSize:
    return ByteSize(int(size * _GIB))


def _mib(size: float) -> ByteSize:
    return _gib(size / 1024)


# torchrec/distributed/planner/constants.py of TorchRec 1.8, which does not say where most are from.
# Its estimate knows no latency and no efficiency.
_TORCHREC = Hardware(
    kind="torchrec-80GB",
    device_memory_bytes=_gib(80),  # not TorchRec's default, which is 32
    host_memory_bytes=_gib(128),  # DDR_CAP, which TorchRec counts for each device
    device_bandwidth_gb_s=897 * _TORCHREC_GB_S,
    host_link_bandwidth_gb_s=32 * _TORCHREC_GB_S,
    intra_host_bandwidth_gb_s=600 * _TORCHREC_GB_S,
    inter_host_bandwidth_gb_s=12.5 * _TORCHREC_GB_S,
    kernel_launch_us=0,
    intra_host_latency_us=0,
    inter_host_latency_us=0,
    gather_efficiency=1,
    collective_efficiency=1,
    reserved_memory_fraction=0.15,  # what EmbeddingShardingPlanner reserves
)

_A100_40GB = Hardware(
    kind="A100-40GB",
    device_memory_bytes=_gib(39.4),  # CUDA reports 40,441 MiB (PC2, Paderborn: deviceQuery)
    host_memory_bytes=_gib(512),  # DGX: 1 TB
    device_bandwidth_gb_s=1555,  # datasheet, SXM
    device_cache_bytes=_mib(40),  # datasheet; CUDA reports 41,943,040
    device_cache_bandwidth_gb_s=5400,  # gpu-benches: A100 80 GB
    host_link_bandwidth_gb_s=32,  # datasheet: PCIe Gen4 x16
    intra_host_bandwidth_gb_s=300,  # datasheet: NVLink
    inter_host_bandwidth_gb_s=25,  # DGX: a 200 Gb/s adapter for each GPU
    kernel_launch_us=5,  # assumed
    intra_host_latency_us=20,  # assumed
    inter_host_latency_us=40,  # assumed
    gather_efficiency=0.75,  # assumed
    collective_efficiency=0.8,  # nccl-tests 212, rounded
    dense_tflops=156,  # datasheet: TF32
)

_A100_80GB = _A100_40GB.model_copy(
    update={
        "kind": "A100-80GB",
        "device_memory_bytes": _gib(79),  # assumed: 80 GiB less what CUDA keeps of the 40 GB model
        "host_memory_bytes": _gib(1024),  # DGX: 2 TB
        "device_bandwidth_gb_s": 2039.0,  # datasheet, SXM
    }
)

_H100 = Hardware(
    kind="H100",
    device_memory_bytes=_gib(79),  # nvidia-smi: 81,559 MiB (modal-labs/modal-client, pull 2797)
    host_memory_bytes=_gib(1024),  # DGX: 2 TB
    device_bandwidth_gb_s=3350,  # datasheet, SXM
    device_cache_bytes=_mib(50),  # NVIDIA, Hopper white paper
    device_cache_bandwidth_gb_s=9700,  # assumed: that of the H200, which has the same chip
    host_link_bandwidth_gb_s=64,  # datasheet: PCIe Gen5 x16
    intra_host_bandwidth_gb_s=450,  # datasheet: NVLink
    inter_host_bandwidth_gb_s=50,  # DGX: a 400 Gb/s adapter for each GPU
    kernel_launch_us=5,  # assumed
    intra_host_latency_us=20,  # assumed
    inter_host_latency_us=40,  # assumed
    gather_efficiency=0.73,  # assumed
    collective_efficiency=0.82,  # nccl-tests 212
    dense_tflops=494,  # datasheet: TF32
)

_H200 = _H100.model_copy(
    update={
        "kind": "H200",
        "device_memory_bytes": _gib(139),  # what CUDA reports, rounded down; datasheet: 141 GB
        "device_bandwidth_gb_s": 4800.0,  # datasheet, SXM
        "device_cache_bandwidth_gb_s": 9700.0,  # gpu-benches: H200
    }
)

_B200 = Hardware(
    kind="B200",
    # CUDA reports 178.35 GiB, 126.5 MiB of cache and a bus of 7680 bits at 3996 MHz, 7672 GB/s
    # (github.com/pytorch/ao, pull 4002). The package has 192 GB; NVIDIA's HGX B200 lists 180 GB.
    device_memory_bytes=_gib(178),
    host_memory_bytes=_gib(1024),  # DGX: 2 TB
    device_bandwidth_gb_s=7672,
    device_cache_bytes=_mib(126.5),
    device_cache_bandwidth_gb_s=None,  # no measurement found
    host_link_bandwidth_gb_s=64,  # DGX: its hosts have PCIe Gen5 x16
    intra_host_bandwidth_gb_s=900,  # datasheet: NVLink
    inter_host_bandwidth_gb_s=50,  # DGX: a 400 Gb/s adapter for each GPU
    kernel_launch_us=5,  # assumed
    intra_host_latency_us=20,  # assumed
    inter_host_latency_us=40,  # assumed
    gather_efficiency=0.73,  # assumed: that of the H200
    collective_efficiency=0.82,  # assumed: that of the H100
    dense_tflops=1100,  # datasheet, HGX: TF32
)

_L40S = Hardware(
    kind="L40S",
    device_memory_bytes=_gib(44.4),  # CUDA: 44.42 GiB (stepfun-ai/Step-Video-T2V, issue 8)
    host_memory_bytes=_gib(256),  # assumed: half of a host of 512 GB
    device_bandwidth_gb_s=864,  # datasheet
    device_cache_bytes=_mib(96),  # NVIDIA, Ada white paper; gpu-benches: L40, the same chip
    device_cache_bandwidth_gb_s=5200,  # gpu-benches: L40
    host_link_bandwidth_gb_s=32,  # datasheet: PCIe Gen4 x16
    intra_host_bandwidth_gb_s=32,  # datasheet: PCIe Gen4 x16, there is no NVLink
    inter_host_bandwidth_gb_s=12.5,  # assumed: 100 Gb/s for each GPU
    kernel_launch_us=5,  # assumed
    intra_host_latency_us=20,  # assumed
    inter_host_latency_us=40,  # assumed
    gather_efficiency=0.83,  # assumed
    collective_efficiency=0.6,  # assumed: GPUs share PCIe switches and the link between sockets
    dense_tflops=183,  # datasheet: TF32
)

# A rank is a process. A shared machine differs from this by far: give your own numbers in a file.
_CPU = Hardware(
    kind="cpu",
    device_memory_bytes=_gib(16),  # assumed: what one process may take
    host_memory_bytes=ByteSize(0),  # it is the device memory already
    device_bandwidth_gb_s=12.8,  # assumed: 8 channels of DDR4-3200, 204.8 GB/s, for 16 ranks
    host_link_bandwidth_gb_s=12.8,  # the same memory
    intra_host_bandwidth_gb_s=1.5,  # measured: gloo, all-to-all of 128 MiB, two processes, loopback
    inter_host_bandwidth_gb_s=1.25,  # assumed: 10 Gb/s Ethernet
    kernel_launch_us=20,  # assumed: one operator of PyTorch
    intra_host_latency_us=450,  # measured: gloo, all-to-all of 1 KiB, on two shared cores
    inter_host_latency_us=500,  # assumed
    gather_efficiency=0.5,  # assumed
    collective_efficiency=1,  # the bandwidth above is what gloo reached
    dense_tflops=0.1,  # assumed: one core at 3 GHz with AVX2, 32 operations a cycle
)

PRESETS = MappingProxyType(
    {h.kind: h for h in (_TORCHREC, _A100_40GB, _A100_80GB, _H100, _H200, _B200, _L40S, _CPU)}
)


def preset(kind: str) -> Hardware:
    """The preset named `kind`, in whatever case; RequestError lists all where there is none."""
    by_name = {name.casefold(): name for name in PRESETS}
    name = by_name.get(kind.casefold())
    if name is not None:
        return PRESETS[name]
    given = kind.casefold()
    begun = [by_name[known] for known in by_name if given and known.startswith(given)]
    close = [by_name[n] for n in difflib.get_close_matches(given, by_name, n=1, cutoff=0.4)]
    hint = f"; did you mean {' or '.join(begun or close)}?" if begun or close else "."
    raise RequestError(
        f"there is no hardware kind {shorten(kind)}{hint} Known are {', '.join(PRESETS)}; "
        "describe other hardware in a topology file"
    )
