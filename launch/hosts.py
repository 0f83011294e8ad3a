"""`shardemb launch`: a run on many hosts."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from launch.data import ConfigPath, Json, Overrides
from planner import RequestError

launch_app = typer.Typer(no_args_is_help=True, help="Run on many hosts.")


@launch_app.command()
def torchrun(
    config_path: ConfigPath,
    overrides: Overrides = None,
    nnodes: Annotated[int, typer.Option(help="hosts that take part", min=1)] = 1,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="workers on each; default: launch.nproc_per_node", min=1)
    ] = None,
    rdzv_endpoint: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="where they meet: one of the hosts, a free port"),
    ] = "localhost:29500",
    emit: Annotated[
        Literal["slurm"] | None, typer.Option(help="print a batch script that does it, and stop")
    ] = None,
    as_json: Json = False,
) -> None:
    """This host's part of a run on `--nnodes` hosts: give the same command on each of them.

    Workers that fail are started again and go on from the last checkpoint. SIGTERM saves one first.
    """
    from launch.slurm import slurm_script
    from shardemb.config import load_config
    from shardemb.quiet import silence_libraries
    from shardemb.summary import summarize

    overrides = list(overrides or ())
    if nproc_per_node is not None:
        overrides.append(f"launch.nproc_per_node={nproc_per_node}")
    config = load_config(config_path, overrides)
    if emit:
        print(slurm_script(config, str(config_path), overrides, nnodes), end="")
        return
    silence_libraries()
    from launch.torchrun import check_hosts, run_torchrun

    check_hosts(config, nnodes)
    worker = ["-m", "shardemb.train", str(config_path), *overrides]
    run_torchrun(config, worker, nnodes, rdzv_endpoint)
    result = json.loads((config.output / "result.json").read_text())
    print(json.dumps(result) if as_json else summarize(config, result))


@launch_app.command()
def ray(
    config_path: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="of a running cluster; default: this machine alone; with --submit its URL",
        ),
    ] = None,
    num_hosts: Annotated[
        int | None, typer.Option(help="default: elastic.max_hosts, or all that have room", min=1)
    ] = None,
    workers_per_host: Annotated[
        int | None, typer.Option(help="default: launch.nproc_per_node", min=1)
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="as a job of the cluster at --address http://HEAD:8265")
    ] = False,
    emit: Annotated[
        Literal["kuberay"] | None, typer.Option(help="print a RayJob manifest, and stop")
    ] = None,
    image: Annotated[str | None, typer.Option(help="with --emit: of the containers")] = None,
    claim: Annotated[
        str | None,
        typer.Option(metavar="NAME:PATH", help="with --emit: a volume claim that hosts share"),
    ] = None,
    as_json: Json = False,
) -> None:
    """A run on the hosts of a Ray cluster.

    Workers that fail are started again and go on from the last checkpoint, on fewer hosts where
    `elastic` allows it. SIGTERM saves one first. With --submit the run is a job, which is followed
    and whose exit code is this command's; Ctrl-C leaves it running.
    """
    from shardemb.config import load_config
    from shardemb.summary import summarize

    overrides = list(overrides or ())
    if workers_per_host is not None:
        overrides.append(f"launch.nproc_per_node={workers_per_host}")
    config = load_config(config_path, overrides)
    for option, value in {"--image": image, "--claim": claim}.items():
        if value is not None and emit is None:
            raise RequestError(f"{option} is of the manifest: say --emit kuberay too")
    if emit:
        from launch.kuberay import kuberay_manifest

        print(kuberay_manifest(config, image, num_hosts, claim), end="")
        return
    if submit:
        from launch.ray_job import run_job

        if address is None:
            raise RequestError("--submit needs --address http://HEAD:8265")
        options = ["--num-hosts", str(num_hosts)] if num_hosts else []
        result = json.loads(run_job(config, config_path, overrides, options, address))
    else:
        from launch.ray_launcher import run_ray

        result = json.loads(run_ray(config, num_hosts, address))
    print(json.dumps(result) if as_json else summarize(config, result))
