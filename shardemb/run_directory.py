"""The run directory: config.yaml, plan.json, metrics.jsonl, tensorboard/, and at the end
result.json or, of a run that failed, failure.json; run_id, where a launcher has named the run, and
the logs/ that it keeps."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from planner import Plan, RequestError, UserError
from planner.files import partial_of, replace_file
from shardemb.config import RunConfig
from shardemb.failure import (
    directory_note,
    failure_file,
    failure_of,
    has_launcher,
    note_directory,
)
from shardemb.supervision import RUN_ID


@dataclass(frozen=True)
class Created:
    """A run directory that a run has created: by its inode, for its path may become another's."""

    path: str
    device: int
    inode: int
    earlier: str | None  # where the earlier run of this name is now
    is_resumed: bool = False  # it was there before: this run goes on in it

    def is_there(self) -> bool:
        """Or another is in its place: an earlier run, whose name it had for a while."""
        with suppress(OSError):
            found = Path(self.path).stat()
            return (found.st_dev, found.st_ino) == (self.device, self.inode)
        return False


class RunDirectory:
    """Where a run keeps what it makes; an earlier run of the same `output` stays beside it.

    It is created when there is something to keep, so that a run which fails at its first batch
    leaves nothing behind. As a context manager it leaves what `close_failed` says where its block
    fails; a launcher does so itself, because it knows of all ranks and outlives them.
    """

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        check_output(config.output)
        self.path = config.output
        self._config, self._plan = config, plan
        self._created: Created | None = None
        self._resumed_step: int | None = None

    def resume_at(self, step: int) -> None:
        """Have `create` go on in the directory that there is, as it was after `step`."""
        self._resumed_step = step

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error and self._created and not has_launcher():
            close_failed(self._created, failure_of(error).message)

    def create(self) -> None:
        """The directory with config.yaml and plan.json in it, or all as it was before."""
        kept, ours, resumed = None, False, self._resumed_step
        try:
            check_output(self.path)
            kept = _set_aside(self.path) if resumed is None else None
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)  # held as long as this process lives
            if not is_begun(self.path):  # NFS keeps the lock of a lost host for a while
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = resumed is None
            self._note_created(kept)
            replace_file(self.path / "config.yaml", self._config.to_yaml())
            replace_file(self.path / "plan.json", self._plan.to_json())
            if RUN_ID in os.environ:
                replace_file(self.path / "run_id", os.environ[RUN_ID])
            if resumed is not None:
                _forget_after(self.path, resumed)
        except OSError as error:
            if ours:  # never an earlier run, or one that another process has just begun
                shutil.rmtree(self.path, ignore_errors=True)
            if kept and not self.path.exists():
                kept.rename(self.path)
            raise UserError(_cannot_write(self.path, error)) from error

    def write_result(self, result: dict[str, Any]) -> None:
        """result.json, whole or not at all."""
        try:
            write_json(self.path / "result.json", result)
        except OSError as error:
            raise UserError(_cannot_write(self.path, error)) from error

    def _note_created(self, earlier: Path | None) -> None:
        found = os.fstat(self._lock)
        self._created = Created(
            path=str(self.path.absolute()),
            device=found.st_dev,
            inode=found.st_ino,
            earlier=str(earlier.absolute()) if earlier else None,
            is_resumed=self._resumed_step is not None,
        )
        if has_launcher():
            note_directory(asdict(self._created))


def is_begun(path: Path, run_id: str | None = None) -> bool:
    """Whether workers that the launcher has started before began this run, in `path`."""
    with suppress(FileNotFoundError):
        return (path / "run_id").read_text() == (run_id or os.environ.get(RUN_ID))
    return False


def begun_directory(reports: Path, output: Path | None, run_id: str | None) -> Path | None:
    """For a launcher: the directory that its workers, which report in `reports`, write a run in, or
    those of another host; None before there is one."""
    for note in reports.glob(directory_note(failure_file(reports, "*")).name):
        created = Created(**json.loads(note.read_text()))
        return Path(created.path) if created.is_there() else None
    return output if output and run_id and is_begun(output, run_id) else None


def close_failed(created: Created, error: str) -> None:
    """End the directory of a run that failed with the message `error`; its writer is gone.

    failure.json goes beside the metrics. A run that reported no step after its first and has no
    checkpoint has nothing to keep: its directory goes, and the earlier run gets its name back.
    Never raises, so that the failure of the run stays the one that is shown.
    """
    path = Path(created.path)
    with suppress(OSError, ValueError):  # ValueError: metrics.jsonl was changed from outside
        if not created.is_there() or (path / "result.json").exists():
            return
        steps = _reported_steps(path / "metrics.jsonl")
        if len(steps) > 1 or created.is_resumed or (path / "checkpoints").exists():
            partial_of(path / "result.json").unlink(missing_ok=True)
            last = steps[-1] if steps else None
            write_json(path / "failure.json", {"error": error, "step": last})
            return
        shutil.rmtree(path)
        if created.earlier:
            Path(created.earlier).rename(path)


def _reported_steps(metrics: Path) -> list[int]:
    return [record["step"] for record in reports(metrics)]


def reports(metrics: Path) -> list[dict[str, Any]]:
    """Of training, in metrics.jsonl, which loses a last line that was not written to its end."""
    return [
        record for record in map(json.loads, _whole_lines(metrics)) if record["kind"] == "train"
    ]


def _whole_lines(metrics: Path) -> list[bytes]:
    if not metrics.exists():
        return []
    text = metrics.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(metrics, len(whole))
    return whole.splitlines()


def _forget_after(path: Path, step: int) -> None:
    """Leave of an earlier run what was true after `step`, for one that goes on there."""
    for name in ("result.json", "failure.json"):
        (path / name).unlink(missing_ok=True)
    metrics = path / "metrics.jsonl"
    lines = [line.decode() for line in _whole_lines(metrics) if json.loads(line)["step"] <= step]
    replace_file(metrics, "".join(f"{line}\n" for line in lines))


def write_json(target: Path, value: dict[str, Any]) -> None:
    """Whole or not at all; raises OSError."""
    replace_file(target, json.dumps(value, indent=2) + "\n")


def without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(path: Path) -> None:
    """Raise UserError where a run directory cannot be `path`: before hours of work, not after."""
    try:
        if path.is_dir() and any(path.iterdir()) and not (path / "config.yaml").exists():
            raise RequestError(
                f"output: {path} is not empty and not a run directory; choose another with "
                "output=DIR"
            )
        if _is_in_use(path) and not is_begun(path):
            raise UserError(
                f"output: another run is writing {path}; wait for it, or choose another directory "
                "with output=DIR"
            )
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not nearest.is_dir():
            raise RequestError(f"output: {nearest} is a file; choose another with output=DIR")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error


def _is_in_use(path: Path) -> bool:
    if not path.is_dir():
        return False
    directory = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(directory)
    return False


def _set_aside(path: Path) -> Path | None:
    """Rename an earlier run `NAME` to the first free `NAME.1`, `NAME.2` ..."""
    if not path.is_dir() or not any(path.iterdir()):
        return None
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.rename(path.with_name(f"{path.name}.{number}"))


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"output: cannot write the run directory {path} ({error.strerror}); make room there, or "
        "choose another with output=DIR"
    )
