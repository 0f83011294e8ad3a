"""Which checkpoints a folder holds, and their manifests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from planner import UserError
from planner.validation import nearest
from shardemb.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from shardemb.checkpoint.store import Store
from shardemb.checkpoint.tensor_file import TensorFile

LIST = "checkpoints.json"


def read_names(store: Store) -> list[str]:
    """The whole checkpoints of a folder, oldest first; none where there is no list yet."""
    try:
        names = json.loads(store.read(LIST))["checkpoints"]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("names are no text")
        return list(names)
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        whole = [name for name in store.folders() if _is_whole(store, name)]
        raise UserError(
            f"{store.path(LIST)} is damaged; whole checkpoints beside it: "
            f"{', '.join(whole) or 'none'}. Write it again as "
            f"{json.dumps({'checkpoints': whole})}"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {store.path(LIST)} ({error.strerror or error})") from error


def read_best(store: Store) -> str | None:
    """The one of `read_names` that is kept as the best; raises nothing that it does not."""
    with suppress(FileNotFoundError):
        best = json.loads(store.read(LIST)).get("best")
        return best if isinstance(best, str) else None
    return None


def list_of(names: list[str], best: str | None) -> bytes:
    """What LIST says."""
    marked = {} if best is None else {"best": best}
    return json.dumps({"checkpoints": names, **marked}).encode()


def _is_whole(store: Store, name: str) -> bool:
    try:
        read_checkpoint(store, name)
    except UserError:
        return False
    return True


def read_checkpoint(store: Store, name: str) -> Manifest:
    """What the checkpoint of this name holds; UserError where there is none, or it is damaged."""
    path = store.path(f"{name}/{MANIFEST}")
    try:
        return read_manifest(store.read(f"{name}/{MANIFEST}"), path)
    except FileNotFoundError:
        there = store.folders()
        raise UserError(
            f"there is no checkpoint {store.path(name)}{nearest(name, there)}; in {store.root} "
            f"there are {', '.join(there) or 'none'}"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


@contextmanager
def opened(store: Store, manifest: Manifest) -> Iterator[dict[str, TensorFile]]:
    """The files of a checkpoint, by the names that its entries have for them."""
    with ExitStack() as stack:
        files = {}
        for name, entry in manifest.files.items():
            files[name] = TensorFile(store, name, entry)
            stack.callback(files[name].close)
        yield files
