"""`shardemb launch ray --emit kuberay`: a manifest that Kubernetes takes, from the run's config.

What is required is what ray.io/v1 requires (ray-operator/apis/ray/v1 in ray-project/kuberay).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli import app
from launch.matching import read_pins
from planner import RequestError
from shardemb.config import RunConfig
from tests.launch.tiny_run import tiny_config, write_config

COMMAND = ["launch", "ray", "--emit", "kuberay", "--image", "registry/shardemb:1"]


def write(folder: Path, **changes: Any) -> str:
    return str(write_config(folder / "run.yaml", tiny_config(folder, folder / "run") | changes))


def emitted(*arguments: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The config map, the job and the text."""
    result = CliRunner().invoke(app, [*COMMAND, *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    config, job = yaml.safe_load_all(result.stdout)
    return config, job, result.stdout


def test_what_a_ray_job_must_have(tmp_path: Path) -> None:
    """Also that both groups run the image, and that the head, which has no workers, has the
    config."""
    config, job, _ = emitted(write(tmp_path), "--num-hosts", "3", "train.epochs=7")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert cluster["rayVersion"] == read_pins("ray")["ray"]
    assert {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= group.keys()
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    for part in (head, group):
        (container,) = part["template"]["spec"]["containers"]
        assert container["image"] == "registry/shardemb:1"
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"] == worker["resources"]["requests"] == {"cpu": 2}
    assert head["rayStartParams"]["num-cpus"] == "0"
    spec = head["template"]["spec"]
    assert spec["volumes"] == [{"name": "config", "configMap": {"name": "shardemb"}}]
    assert config["metadata"]["name"] == "shardemb"
    (mount,) = spec["containers"][0]["volumeMounts"]
    assert f"{mount['mountPath']}/run.yaml --num-hosts 3" in job["spec"]["entrypoint"]
    assert RunConfig.model_validate(yaml.safe_load(config["data"]["run.yaml"])).train.epochs == 7


def test_gpus_elastic_hosts_and_storage(tmp_path: Path) -> None:
    """As the config has them; the claim is mounted where the run is, in head and workers."""
    path = write(tmp_path, elastic={"min_hosts": 2, "max_hosts": 4})
    overrides = ["launch.device=cuda", "launch.nproc_per_node=8"]
    _, job, text = emitted(path, "--claim", "datasets:/data", *overrides)
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 2, 4]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": 8}
    for part in (group, cluster["headGroupSpec"]):
        spec = part["template"]["spec"]
        claim = {"name": "shared", "persistentVolumeClaim": {"claimName": "datasets"}}
        assert spec["volumes"][-1] == claim
        mount = {"name": "shared", "mountPath": "/data"}
        assert spec["containers"][0]["volumeMounts"][-1] == mount
    assert "&id" not in text


def test_the_token_is_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every container, and of this user's own nothing is in the text."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5ecret" * 8)
    _, job, text = emitted(write(tmp_path), "--num-hosts", "1")
    assert "5ecret" not in text
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    pods = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    pods += [group["template"] for group in cluster["workerGroupSpecs"]]
    for pod in pods:
        for container in pod["spec"]["containers"]:
            env = {entry["name"]: entry for entry in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            reference = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
            assert f"secret generic {reference['name']} --from-literal={reference['key']}=" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--emit kuberay needs --num-hosts"),
        (["--num-hosts", "1", "--claim", "datasets"], "--claim datasets: write NAME:PATH"),
        (["--num-hosts", "1", "output=runs/a"], "output: runs/a would be in the cluster's"),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, arguments: list[str], said: str) -> None:
    """No half of a manifest."""
    with pytest.raises(RequestError, match=said):
        CliRunner().invoke(app, [*COMMAND, write(tmp_path), *arguments], catch_exceptions=False)


@pytest.mark.parametrize("option", [["--image", "registry/shardemb:1"], ["--claim", "data:/data"]])
def test_options_of_a_manifest_alone(tmp_path: Path, option: list[str]) -> None:
    """They are refused where no manifest is asked for, before a cluster is."""
    arguments = ["launch", "ray", write(tmp_path), *option]
    with pytest.raises(RequestError, match=f"{option[0]} is of the manifest: say --emit kuberay"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
