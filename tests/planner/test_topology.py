from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from planner import RequestError, Topology
from planner.hardware import PRESETS, Hardware, preset
from planner.topology import parse_topology

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "configs/topologies").glob("*.yaml"))
GIB = 2**30


def _file(tmp_path: Path, **document: Any) -> str:
    path = tmp_path / "topology.yaml"
    path.write_text(yaml.safe_dump({"hosts": 2, "devices_per_host": 8, **document}))
    return str(path)


def _message(text: str) -> str:
    with pytest.raises(RequestError) as caught:
        parse_topology(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "world_size", "local_world_size", "kind"),
    [
        ("2x8xA100-80GB", 16, 8, "A100-80GB"),
        ("1x2xcpu", 2, 2, "cpu"),
        ("12X8XTORCHREC-80gb", 96, 8, "torchrec-80GB"),
        ("002x1xH200", 2, 1, "H200"),
    ],
)
def test_short_form(text: str, world_size: int, local_world_size: int, kind: str):
    """HOSTSxDEVICESxKIND: the devices of all hosts, those of one, and the kind's hardware."""
    topology = parse_topology(text)
    assert topology == Topology(
        world_size=world_size, local_world_size=local_world_size, hardware=PRESETS[kind]
    )
    assert topology.num_hosts == world_size // local_world_size


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8xA100-80GB", "write HOSTSxDEVICESxKIND, for example 2x8xA100-80GB, or the path of"),
        ("", "write HOSTSxDEVICESxKIND"),
        ("0x8xH100", "the number of hosts must be a positive integer (found '0')"),
        ("-1x8xH100", "the number of hosts must be a positive integer (found '-1')"),
        ("2x1.5xH100", "the number of devices must be a positive integer (found '1.5')"),
        ("2xxH100", "the number of devices must be a positive integer (found '')"),
        ("²x8xH100", "the number of hosts must be a positive integer (found '²')"),
        ("9" * 5000 + "x8xH100", "the number of hosts must be a positive integer"),
        ("1001x1000xH100", "1001 x 1000 devices are more than 1000000"),
        ("2x8xH10", "there is no hardware kind 'H10'; did you mean H100?"),
    ],
)
def test_short_forms_that_are_refused(text: str, reason: str):
    """The message repeats what was written (cut where it is long) and says what is wrong."""
    message = _message(text)
    assert message.startswith(f"topology '{text[:20]}") and reason in message


def test_memory_limits():
    """By hand: 80 GiB less 15 % are 68 GiB a device; the host's 128 GiB are given in full."""
    topology = parse_topology("2x8xtorchrec-80GB")
    assert topology.device_memory_limit_bytes == 68 * GIB
    assert topology.host_memory_limit_bytes == 128 * GIB
    assert parse_topology("1x2xcpu").host_memory_limit_bytes == 0


def test_hardware_may_be_unknown():
    """Without hardware there are hosts and ranks, but no limits."""
    topology = Topology(world_size=4, local_world_size=2)
    assert (topology.num_hosts, list(topology.ranks_of_host(1))) == (2, [2, 3])
    assert topology.hardware is None
    assert topology.device_memory_limit_bytes is None
    assert topology.host_memory_limit_bytes is None


def test_hosts_are_full():
    """Hosts of different sizes are refused."""
    with pytest.raises(ValidationError, match="world_size 5 is not a multiple"):
        Topology(world_size=5, local_world_size=2)


@pytest.mark.parametrize("hardware", [None, preset("H100")], ids=["unknown", "known"])
def test_json_round_trip(hardware: Hardware | None):
    """What a plan stores of a topology reads back as the same; unknown hardware is left out."""
    topology = Topology(world_size=16, local_world_size=8, hardware=hardware)
    document = topology.model_dump(mode="json")
    assert Topology.model_validate(document) == topology
    assert Topology.model_validate_json(topology.model_dump_json()) == topology
    assert ("hardware" in document) == (hardware is not None)


def test_a_file_names_a_kind(tmp_path: Path):
    """A file with a kind's name is the short form."""
    assert parse_topology(_file(tmp_path, hardware="h100")) == parse_topology("2x8xH100")


def test_a_file_changes_a_kind(tmp_path: Path):
    """`like` takes all of a kind but what the file says itself."""
    changed = {"like": "h100", "device_memory_bytes": "60GiB", "inter_host_bandwidth_gb_s": 25}
    topology = parse_topology(_file(tmp_path, hardware=changed))
    assert topology.hardware == preset("H100").model_copy(
        update={"device_memory_bytes": 60 * GIB, "inter_host_bandwidth_gb_s": 25.0}
    )


def test_a_file_gives_every_field(tmp_path: Path):
    """Hardware that resembles no kind is written out, in any suffix YAML goes by."""
    own = preset("cpu").model_copy(update={"kind": "mine"})
    document = {"hosts": 3, "devices_per_host": 1, "hardware": own.model_dump(mode="json")}
    for name in ["own.yml", "own.YAML", "own.json"]:
        (tmp_path / name).write_text(yaml.safe_dump(document))
        topology = parse_topology(str(tmp_path / name))
        assert topology == Topology(world_size=3, local_world_size=1, hardware=own)


def test_a_file_is_told_by_its_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An x in a file's name does not make it the short form."""
    _file(tmp_path, hardware="cpu")
    (tmp_path / "topology.yaml").rename(tmp_path / "1x8xbox.yaml")
    monkeypatch.chdir(tmp_path)
    assert parse_topology("1x8xbox.yaml").world_size == 16


@pytest.mark.parametrize(
    ("document", "mistakes"),
    [
        (
            {"hosts": "2", "device_per_host": 8, "hardware": "H100"},
            [
                "hosts: Input should be a valid integer (found '2')",
                "device_per_host: unknown key; did you mean devices_per_host?",
            ],
        ),
        ({"hosts": 0, "hardware": "H100"}, ["hosts: Input should be greater than 0 (found 0)"]),
        ({"hosts": True, "hardware": "H100"}, ["hosts: Input should be a valid integer"]),
        ({"hosts": 10**6, "hardware": "H100"}, ["1000000 x 8 devices are more than 1000000"]),
        ({}, ["hardware: required, but not given"]),
        ({"hardware": "H10"}, ["hardware: there is no hardware kind 'H10'; did you mean H100?"]),
        ({"hardware": {"like": "H10"}}, ["hardware.like: there is no hardware kind 'H10'"]),
        ({"hardware": {"like": 5}}, ["hardware.like: must be the name of a kind (found 5)"]),
        ({"hardware": [1]}, ["hardware: give the name of a kind, or fields (found [1])"]),
        (
            {"hardware": {"like": "H100", "gather_efficiency": 2, "device_memory": "8GiB"}},
            [
                "hardware.gather_efficiency: Input should be less than or equal to 1 (found 2)",
                "hardware.device_memory: unknown key; did you mean device_memory_bytes?",
            ],
        ),
        ({"hardware": {"kind": "mine"}}, ["hardware.gather_efficiency: required, but not given"]),
    ],
)
def test_files_that_are_refused(tmp_path: Path, document: dict[str, Any], mistakes: list[str]):
    """The message has the file and every mistake by its full key."""
    path = _file(tmp_path, **document)
    message = _message(path)
    assert path in message and all(mistake in message for mistake in mistakes)


def test_files_that_cannot_be_read(tmp_path: Path):
    """No file, a key given twice, and what is no mapping."""
    path = tmp_path / "t.yaml"
    assert _message(str(path)) == f"cannot read the topology {path}: No such file or directory"
    path.write_text("hosts: 1\nhosts: 2\n")
    assert "'hosts' is given twice, on lines 1 and 2" in _message(str(path))
    path.write_text("- 1\n")
    assert "must hold `key: value` lines, found a list" in _message(str(path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path):
    """The topologies we ship are valid."""
    assert parse_topology(str(path)).hardware is not None
