"""Files of checkpoints: others can read them, and no damage to one goes unnoticed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import UserError
from shardemb.checkpoint import tensor_file
from shardemb.checkpoint.listing import LIST, read_checkpoint, read_names
from shardemb.checkpoint.manifest import MANIFEST, FileEntry, Manifest, TensorEntry
from shardemb.checkpoint.store import Store
from shardemb.checkpoint.tensor_file import TensorFile, write_tensors

TENSORS = {
    "a/weight/0-0": torch.randn(37, 8),
    "half": torch.randn(5, 4).half(),
    "brain": torch.randn(5, 4).bfloat16(),
    "ids": torch.arange(11),
    "state": torch.randint(0, 255, (13,), dtype=torch.uint8),
    "step": torch.tensor(7.0),
    "flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 4),
    "last": torch.randn(9, 3),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are many of them."""
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 100)


def write(folder: Path) -> tuple[Store, FileEntry, dict[str, TensorEntry]]:
    store = Store(folder)
    return store, *write_tensors(store, "t.safetensors", TENSORS)


def read_all(store: Store, file: FileEntry, entries: dict[str, TensorEntry]) -> None:
    opened = TensorFile(store, "t.safetensors", file)
    for name, entry in entries.items():
        assert torch.equal(opened.tensor(entry, name), TENSORS[name])


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path)
    found = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_tensors_come_back(tmp_path: Path) -> None:
    """Each dtype and shape, over the ends of blocks, in new memory that can be changed."""
    store, file, entries = write(tmp_path)
    assert len(file.crc32) == -(-file.bytes // 100)
    assert file.bytes == (tmp_path / "t.safetensors").stat().st_size
    read_all(store, file, entries)
    TensorFile(store, "t.safetensors", file).verify(lambda first, last: "all of it")


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), how=st.sampled_from("fca"))
def test_any_damage_is_found(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, how: str
) -> None:
    """A flipped bit, a file cut short, bytes added: wherever it is, verifying names the file."""
    folder = tmp_path_factory.mktemp("damaged")
    store, file, entries = write(folder)
    path = folder / "t.safetensors"
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    if how == "f":
        data[at] ^= 1 << bit
    elif how == "c":
        del data[at:]
    else:
        data += b"x" * (at + 1)
    path.write_bytes(data)
    with pytest.raises(UserError, match="t.safetensors is damaged"):
        TensorFile(store, "t.safetensors", file).verify(lambda first, last: "table a")
    header = min(entry.start for entry in entries.values())
    if how == "f" and at >= header:  # reading alone finds it too
        with pytest.raises(UserError, match="t.safetensors is damaged: bytes .*, in "):
            read_all(store, file, entries)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    store, file, _ = write(tmp_path)
    (tmp_path / "t.safetensors").unlink()
    with pytest.raises(UserError, match=r"t\.safetensors cannot be read \(No such file"):
        TensorFile(store, "t.safetensors", file)


# --- Manifest and list


def manifest(**fields: object) -> Manifest:
    values = {
        "created": "2026-01-01T00:00:00+00:00", "step": 3, "samples": 12, "world_size": 2,
        "plan": {}, "loader": None, "tables": {}, "dense_optimizer": "adam", "pieces": [],
        "tensors": {}, "files": {},
    }  # fmt: skip
    return Manifest.model_validate({**values, **fields})


def save(folder: Path, name: str, data: bytes) -> Store:
    store = Store(folder)
    store.write(f"{name}/{MANIFEST}", [data])
    return store


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    written = manifest(loader={"epoch": 1, "segments": [], "seed": None})
    assert read_checkpoint(save(tmp_path, "step-3", written.to_bytes()), "step-3") == written


def test_any_damage_to_a_manifest_is_found(tmp_path: Path) -> None:
    """Every byte flipped, every length cut to."""
    data = manifest().to_bytes()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 4
        for damaged in (bytes(flipped), data[:at]):
            if damaged.rstrip(b"\n") == data.rstrip(b"\n"):
                continue  # without its last line's end it says the same
            with pytest.raises(UserError, match="manifest.json is damaged"):
                read_checkpoint(save(tmp_path, "step-3", damaged), "step-3")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    document = {**manifest().model_dump(mode="json"), "version": 2, "new": 1}
    text = json.dumps(document).encode() + b"\n"
    store = save(tmp_path, "step-3", text + f"{zlib.crc32(text):08x}\n".encode())
    with pytest.raises(UserError, match="has format version 2, and this shardemb reads version 1"):
        read_checkpoint(store, "step-3")


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    """The nearest name there is, and all there are."""
    store = save(tmp_path, "step-00000010", manifest().to_bytes())
    with pytest.raises(UserError, match="no checkpoint .*step-00000100.*there are step-00000010"):
        read_checkpoint(store, "step-00000100")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"checkpoints": 3}', '{"checkpoints": [3]}']
)
def test_a_damaged_list_offers_what_is_whole(tmp_path: Path, text: str) -> None:
    store = save(tmp_path, "step-1", manifest().to_bytes())
    save(tmp_path, "step-2", manifest().to_bytes()[:-20])
    assert read_names(store) == []
    store.write(LIST, [text.encode()])
    with pytest.raises(UserError) as caught:
        read_names(store)
    assert "checkpoints.json is damaged" in str(caught.value)
    assert 'Write it again as {"checkpoints": ["step-1"]}' in str(caught.value)


# --- Anywhere


@pytest.fixture(params=["local", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(tmp_path / "deep" / "er")
    else:
        yield Store("memory://bucket/run")
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_store_is_the_same_anywhere(store: Store) -> None:
    """Files are written, replaced, listed, read by ranges and deleted, here and at a URL."""
    assert store.folders() == []
    with pytest.raises(FileNotFoundError):
        store.read("a/f")
    store.write("a/f", [b"one", memoryview(b"two")])
    store.write("b/f", [])
    store.write("a/f", [b"other"])
    assert store.folders() == ["a", "b"]
    assert store.read("b/f") == b""
    with store.open("a/f") as file:
        file.seek(2)
        assert file.read(2) == b"he"
    store.delete_folder("a")
    store.delete_folder("never")
    assert store.folders() == ["b"]


def half() -> Iterator[bytes]:
    yield b"half of"
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_what_there_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("f", [b"whole"])
    with pytest.raises(OSError, match="No space left"):
        store.write("f", half())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"whole"}


def test_a_write_that_fails_leaves_no_half(store: Store) -> None:
    with pytest.raises(OSError, match="No space left"):
        store.write("a/new", half())
    with pytest.raises(FileNotFoundError):
        store.read("a/new")
