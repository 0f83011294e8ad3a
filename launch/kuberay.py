"""A Kubernetes manifest that does what `shardemb launch ray` does: a RayJob of KubeRay.

Fields are those of ray.io/v1 (ray-operator/apis/ray/v1 in ray-project/kuberay), KubeRay 1.0 on.
"""

from __future__ import annotations

from typing import Any

import yaml

from launch.matching import read_pins
from launch.ray_job import refuse_relative
from planner import RequestError
from shardemb.config import RunConfig

_NAME = "shardemb"
_SECRET, _KEY = "shardemb-ray-token", "auth_token"
_CONFIG_FOLDER = "/etc/shardemb"
_HEADER = f"""\
# kubectl create secret generic {_SECRET} --from-literal={_KEY}="$(openssl rand -hex 32)"
# kubectl apply -f THIS_FILE
"""


def kuberay_manifest(
    config: RunConfig, image: str | None, num_hosts: int | None, claim: str | None
) -> str:
    """Two YAML documents, the config and the job; the cluster's token stays in a Secret.

    `claim` is NAME:PATH, a volume that all hosts share. What depends on the cluster (memory, node
    selectors, priorities) is for its user to add.
    """
    hosts = num_hosts or config.elastic.max_hosts
    if image is None or hosts is None:
        missing = "--image" if image is None else "--num-hosts"
        raise RequestError(f"--emit kuberay needs {missing}")
    refuse_relative(config)
    documents = _config_map(config), _job(config, image, hosts, claim)
    return _HEADER + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False)


def _config_map(config: RunConfig) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _NAME},
        "data": {"run.yaml": config.to_yaml()},
    }


def _job(config: RunConfig, image: str, hosts: int, claim: str | None) -> dict[str, Any]:
    workers = config.launch.nproc_per_node
    device = "nvidia.com/gpu" if config.launch.device == "cuda" else "cpu"
    room = {"resources": {"limits": {device: workers}, "requests": {device: workers}}}
    config_volume = {"name": "config", "configMap": {"name": _NAME}}
    config_mount = {"name": "config", "mountPath": _CONFIG_FOLDER}
    volumes, mounts = _shared(claim)
    head = _container("head", image) | {"volumeMounts": [config_mount, *mounts]}
    worker = _container("worker", image) | room | {"volumeMounts": mounts}
    submitter = {"restartPolicy": "Never", "containers": [_container("submitter", image)]}
    cluster = {
        "rayVersion": read_pins("ray")["ray"],
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},  # it has no workers
            "template": {"spec": {"containers": [head], "volumes": [config_volume, *volumes]}},
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": hosts,
                "minReplicas": config.elastic.min_hosts or hosts,
                "maxReplicas": config.elastic.max_hosts or hosts,
                "rayStartParams": {},
                "template": {"spec": {"containers": [worker], "volumes": volumes}},
            }
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": _NAME},
        "spec": {
            "entrypoint": f"shardemb launch ray {_CONFIG_FOLDER}/run.yaml --num-hosts {hosts} "
            '--address "$RAY_ADDRESS"',
            "shutdownAfterJobFinishes": True,
            "submitterPodTemplate": {"spec": submitter},
            "rayClusterSpec": cluster,
        },
    }


def _container(name: str, image: str) -> dict[str, Any]:
    token = {"secretKeyRef": {"name": _SECRET, "key": _KEY}}
    return {
        "name": f"ray-{name}",
        "image": image,
        "env": [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        ],
    }


class _Dumper(yaml.SafeDumper):
    """Writes what occurs twice twice, and text of several lines as it is."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _shared(claim: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The volume that all hosts share, and where they have it."""
    if claim is None:
        return [], []
    name, _, path = claim.partition(":")
    if not name or not path.startswith("/"):
        raise RequestError(f"--claim {claim}: write NAME:PATH, for example datasets:/data")
    volume = {"name": "shared", "persistentVolumeClaim": {"claimName": name}}
    return [volume], [{"name": "shared", "mountPath": path}]
