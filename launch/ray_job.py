"""`shardemb launch ray --submit`: the run as a job of a Ray cluster, followed until it ends.

The job's own process is `shardemb launch ray` again, on the cluster's head. It does not end with
this one: what is submitted is meant to outlive a terminal.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ray_cluster import check_token_file, import_ray
from launch.recovery import WorkerError
from planner import RequestError, UserError
from shardemb.config import RunConfig

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_RESULT = '{"steps": '  # how the line begins that the job ends with
_LEFT_OUT = [".git", ".venv"]  # of the working directory
_LOST_SECONDS = 60.0  # that the cluster may not answer


def run_job(
    config: RunConfig, config_path: Path, overrides: Sequence[str], options: Sequence[str], url: str
) -> str:
    """Upload this directory, run `shardemb launch ray` in it there, follow it; its result.json.

    WorkerError with the job's exit code where it fails.
    """
    refuse_relative(config)
    client = _client(url)
    command = ["python", "-m", "launch", "launch", "ray", _inside(config_path), *overrides]
    job = client.submit_job(
        entrypoint=f'{shlex.join([*command, *options])} --json --address "$RAY_ADDRESS"',
        runtime_env={
            "working_dir": ".",
            "excludes": [*_LEFT_OUT, *_made_here(config)],
            "env_vars": {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]},
        },
    )
    _say(f"submitted {job} to {url}")
    try:
        result = asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        _say(f"{job} goes on; {_how(job, url)}")
        raise
    except (OSError, RuntimeError) as error:
        raise UserError(f"the cluster at {url} does not answer; {_how(job, url)}") from error
    info = client.get_job_info(job)
    if info.status != "SUCCEEDED":
        end = {"STOPPED": "was stopped"}.get(info.status, "failed")
        reason = (info.message or "").partition("\n")[0]  # its logs come after
        raise WorkerError(f"the job {job} {end}: {reason}", info.driver_exit_code or 1)
    return result


def refuse_relative(config: RunConfig) -> None:
    """RequestError where the run would write, or look for data, in a job's temporary directory."""
    places = {
        "output": str(config.output),
        "data.dir": config.data.dir,
        "checkpoint.dir": config.checkpoint.dir or str(config.output),
    }
    for key, place in places.items():
        if not Path(place).is_absolute() and "://" not in place:
            raise RequestError(
                f"{key}: {place} would be in the cluster's temporary copy of this directory; give "
                "a path from / that all hosts share"
            )


def _client(url: str) -> JobSubmissionClient:
    import_ray()
    if importlib.util.find_spec("aiohttp") is None:
        raise RequestError("--submit needs Ray's job client: pip install 'ray[default]'")
    check_token_file()
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(url)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--address {url}: the cluster takes no job there ({error})") from error


def _inside(config_path: Path) -> str:
    path = config_path.resolve()
    if not path.is_relative_to(Path.cwd()):
        raise RequestError(
            f"{config_path} is not in this directory, which is what a job gets: change to its own"
        )
    return str(path.relative_to(Path.cwd()))


def _made_here(config: RunConfig) -> list[str]:
    """Data and runs in this directory: they are not uploaded."""
    places = [Path(place) for place in (config.data.dir, config.output)]
    return [str(p.relative_to(Path.cwd())) for p in places if p.is_relative_to(Path.cwd())]


async def _follow(client: JobSubmissionClient, job: str) -> str:
    """Show what the job prints until it has ended; the line that is its result, if it had one."""
    shown, answered, result = 0, time.monotonic(), ""
    while True:
        position = 0
        try:
            async for text in client.tail_job_logs(job):  # from its beginning
                for line in text.splitlines(keepends=True):
                    position += 1
                    if position <= shown:
                        continue
                    shown, answered = position, time.monotonic()
                    if line.startswith(_RESULT):
                        result = line
                    else:
                        print(line, end="", file=sys.stderr, flush=True)
            if client.get_job_status(job).is_terminal():
                return result
        except (OSError, RuntimeError):
            if time.monotonic() - answered > _LOST_SECONDS:
                raise
        await asyncio.sleep(1)


def _how(job: str, url: str) -> str:
    return (
        f"follow it with `ray job logs {job} --address {url} --follow`, end it with "
        f"`ray job stop {job} --address {url}`"
    )


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)
