"""The deployment files: what Ray and KubeRay would read in them is valid and safe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raytx.cluster import DRIVER
from raytx.serve import ServeArgs

ROOT = Path(__file__).parents[1]
VARIANTS = ("aws", "local")
TOKEN = "~/.ray/auth_token"


def launcher(variant: str) -> dict[str, Any]:
    """Read cluster.yaml as it is, or its commented on-premises part with the comment signs taken away."""
    text = (ROOT / "cluster.yaml").read_text()
    if variant == "local":
        lines = text[text.index("# cluster_name:") :].splitlines()
        text = "\n".join(line.removeprefix("# ") for line in lines)
    return yaml.safe_load(text)


def manifest(name: str, kind: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "examples/kubernetes" / name).read_text())
    return next(document for document in documents if document["kind"] == kind)


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cluster_yaml_is_valid_to_rays_own_schema(variant: str) -> None:
    config = launcher(variant)
    assert config["provider"]["type"] == variant
    validate_config(prepare_config(config))


def test_rays_schema_refuses_a_key_it_does_not_know() -> None:
    config = prepare_config(launcher("aws")) | {"setup_command": []}
    with pytest.raises(Exception, match="setup_command"):
        validate_config(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_node_starts_ray_in_token_mode_with_the_shared_token(variant: str) -> None:
    config = launcher(variant)
    assert config["file_mounts"][TOKEN] == TOKEN
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_dashboard_of_the_cluster_listens_on_loopback(variant: str) -> None:
    (start,) = [command for command in launcher(variant)["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_nodes_install_one_pinned_ray_and_raytx_with_constraints(variant: str) -> None:
    (install,) = [command for command in launcher(variant)["setup_commands"] if "pip install" in command]
    assert re.search(r"ray\[[a-z,]*train[a-z,]*\]==2\.60\.0", install)
    assert "-c ~/raytx/constraints.txt" in install
    assert launcher(variant)["file_mounts"]["~/raytx"] == "."


def test_the_workers_are_spot_gpus_that_scale_from_none() -> None:
    worker = launcher("aws")["available_node_types"]["gpu"]
    assert (worker["min_workers"], worker["max_workers"]) == (0, 8)
    assert worker["resources"]["GPU"] > 0
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_drivers_of_trials_have_a_place_on_every_kind_of_cluster() -> None:
    assert launcher("aws")["available_node_types"]["head"]["resources"][DRIVER] > 0
    assert DRIVER in launcher("local")["head_start_ray_commands"][-1]
    head = manifest("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert DRIVER in head["rayStartParams"]["resources"]


def test_the_ray_job_trains_with_raytx_on_storage_that_all_pods_share() -> None:
    spec = manifest("rayjob.yaml", "RayJob")["spec"]
    assert spec["entrypoint"].startswith("python -m raytx train /recipe/recipe.yaml")
    assert "storage_path=/runs" in spec["entrypoint"]
    claim = manifest("rayjob.yaml", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mounts = [
        {mount["name"]: mount["mountPath"] for mount in c["volumeMounts"]} for c in containers(spec["rayClusterSpec"])
    ]
    assert all(mount["runs"] == "/runs" for mount in mounts)


def test_the_ray_job_ends_in_order_and_cleans_up() -> None:
    spec = manifest("rayjob.yaml", "RayJob")["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    (worker,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] > 30


def test_the_ray_service_serves_an_artifact_with_arguments_that_raytx_accepts() -> None:
    config = yaml.safe_load(manifest("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    assert application["import_path"] == "raytx.serve:build_app"
    args = ServeArgs.model_validate(application["args"])
    assert args.directory == "/runs/quickstart/artifacts/hf"
    assert (args.host, args.port) == (config["http_options"]["host"], config["http_options"]["port"])


def test_the_ray_service_demands_a_key_in_every_pod_because_it_listens_beyond_loopback() -> None:
    spec = manifest("rayservice.yaml", "RayService")["spec"]
    keys = [{entry["name"]: entry for entry in container["env"]} for container in containers(spec["rayClusterConfig"])]
    assert all(key["RAYTX_API_KEY"]["valueFrom"]["secretKeyRef"] for key in keys)


@pytest.mark.parametrize(
    ("name", "kind", "key"),
    [("rayjob.yaml", "RayJob", "rayClusterSpec"), ("rayservice.yaml", "RayService", "rayClusterConfig")],
)
def test_clusters_on_kubernetes_require_a_token_and_run_one_ray(name: str, kind: str, key: str) -> None:
    cluster = manifest(name, kind)["spec"][key]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == "2.60.0"
