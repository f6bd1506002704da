"""Promises about the manifests for Kubernetes: its own schema, no rights, and commands that work when they are run.

No cluster is started. A test plays one: the containers' commands run as processes, with the names of services and the
paths of volumes replaced, on a real PostgreSQL and a real MLflow server, until the champion answers a map.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib import request

import kubernetes_validate
import numpy as np
import pytest
import warm
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
OBJECTS = [one for name in KUSTOMIZATION["resources"] for one in yaml.safe_load_all((FOLDER / name).read_text()) if one]
WAIT = 240  # seconds for what takes some on a quiet machine


def named(kind, name):
    (found,) = (one for one in OBJECTS if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found


def pods():
    """Of each object that has pods: name and specification."""
    return [
        (one["metadata"]["name"], one["spec"]["template"]["spec"])
        for one in OBJECTS
        if "template" in one.get("spec", {})
    ]


def containers():
    return [
        pytest.param(name, pod, container, id=f"{name}-{container['name']}")
        for name, pod in pods() for container in [*pod.get("initContainers", []), *pod["containers"]]
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- what can be read


@pytest.mark.parametrize("one", OBJECTS, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
@pytest.mark.parametrize("version", ["1.34", "1.36"])
def test_kubernetes_knows_every_field(one, version):
    kubernetes_validate.validate(one, version, strict=True)


def test_every_file_is_applied_and_every_file_that_is_generated_from_is_there():
    files = {file.name for file in FOLDER.iterdir()} - {"README.md", "kustomization.yaml"}
    generated = {name for made in KUSTOMIZATION["configMapGenerator"] for name in made["files"]}
    assert {*KUSTOMIZATION["resources"], *generated} == files


@pytest.mark.parametrize(("name", "pod", "container"), containers())
def test_a_container_has_limits_and_no_rights(name, pod, container):
    security, of_pod = container["securityContext"], pod["securityContext"]
    assert of_pod["runAsNonRoot"] and of_pod["runAsUser"] > 0 and not pod["automountServiceAccountToken"]
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["readOnlyRootFilesystem"] and security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys() == {"cpu", "memory"}


def test_no_password_stands_in_a_file():
    for one in OBJECTS:
        assert one["kind"] != "Secret"
    for _, _, container in (parameter.values for parameter in containers()):
        for variable in container.get("env", []):
            if "PASSWORD" in variable["name"]:
                assert variable["valueFrom"]["secretKeyRef"] == {"name": "database", "key": "password"}
    assert not re.search(r"://\w+:[^@/\s]+@", "".join(file.read_text() for file in FOLDER.iterdir()))


def test_each_volume_that_is_mounted_is_there_and_each_claim_is_made():
    claims = {one["metadata"]["name"] for one in OBJECTS if one["kind"] == "PersistentVolumeClaim"}
    for name, pod, container in (parameter.values for parameter in containers()):
        of_set = next(
            (one for one in OBJECTS if one["kind"] == "StatefulSet" and one["metadata"]["name"] == name), None
        )
        templates = of_set["spec"]["volumeClaimTemplates"] if of_set else []
        there = {v["name"] for v in pod["volumes"]} | {t["metadata"]["name"] for t in templates}
        assert {mount["name"] for mount in container["volumeMounts"]} <= there
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_whoever_is_talked_to_lets_in_whoever_talks():
    """By the addresses in their commands."""
    allowed = {}
    for policy in (one for one in OBJECTS if one["kind"] == "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            for source in rule.get("from", []):
                labels = tuple(source["podSelector"]["matchLabels"].items())
                allowed.setdefault(policy["metadata"]["name"], set()).update(labels)
    for one in OBJECTS:
        if "template" not in one.get("spec", {}):
            continue
        labels = set(one["spec"]["template"]["metadata"]["labels"].items())
        text = json.dumps(one["spec"]["template"]["spec"])
        for service in re.findall(r"(?:@|//)(postgres|mlflow):\d+", text):
            assert labels & allowed[service], f"{one['metadata']['name']} to {service}"


# ------------------------------------------------------------------------------------------------- what can be played


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Cluster:
    """Runs containers as processes."""

    def __init__(self, folder, postgres):
        self.folder, self.running = folder, []
        address = postgres.url.rpartition("@")[2].partition("/")[0]
        self.ports = {"5000": str(free_port()), "8000": str(free_port())}
        self.hosts = {"postgres:5432": address, "mlflow:5000": f"127.0.0.1:{self.ports['5000']}"}

    def here(self, text, **variables):
        for host, address in self.hosts.items():
            text = text.replace(host, address)
        for name, value in variables.items():
            text = text.replace(f"$({name})", value)
        text = re.sub(r"(^|=)/(?=[a-z])", rf"\1{self.folder}/", text)
        for port, ours in self.ports.items():
            text = text.replace(f"--port={port}", f"--port={ours}")
        return text.replace("0.0.0.0", "127.0.0.1")

    def start(self, pod, name, *, initial=False, **variables):
        spec = dict(pods())[pod]
        (container,) = (one for one in spec["initContainers" if initial else "containers"] if one["name"] == name)
        command = [self.here(word, **variables) for word in [*container["command"], *container.get("args", [])]]
        assert command[0] == "python"
        given = (
            {one["name"]: self.here(one["value"]) for one in container["env"] if "value" in one}
            if ("env" in container)
            else {}
        )
        for mount in container["volumeMounts"]:
            (self.folder / mount["mountPath"].lstrip("/")).mkdir(parents=True, exist_ok=True)
        log = (self.folder / f"{pod}-{name}-{len(self.running)}.log").open("w")
        environment = os.environ | given | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.running.append(warm.Popen(
            [sys.executable, *command[1:]], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        ))  # fmt: skip
        return self.running[-1]

    def answers(self, port, path):
        try:
            with request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def until(self, condition):
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)

    def ended(self, process):
        try:
            return process.wait(timeout=WAIT)
        except subprocess.TimeoutExpired:
            return self.logs()

    def logs(self):
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in sorted(self.folder.glob("*.log")))

    def stop(self):
        for process in self.running:
            process.terminate()
        for process in self.running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def cluster(tmp_path, postgres):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE optuna")  # as POSTGRES_DB has the image do it
        connection.execute((FOLDER / "databases.sql").read_text())
    playing = Cluster(tmp_path, postgres)
    yield playing
    playing.stop()


@pytest.mark.long
def test_the_commands_of_the_containers_search_track_register_and_serve(cluster, tiny_arrays):
    options = yaml.safe_load((FOLDER / "search_options.yaml").read_text())
    small = {"num_optuna_trials": 2, "search_epochs": 1, "max_epochs": 2, "image_size": 16, "batch_size": 16,
             "use_pretrained": False, "time_limit": None}  # fmt: skip
    for folder in ("config", "data"):
        (cluster.folder / folder).mkdir()
    (cluster.folder / "config/search_options.yaml").write_text(yaml.safe_dump(options | small))
    np.savez(cluster.folder / "data/maps.npz", **tiny_arrays)

    mlflow = cluster.start("mlflow", "mlflow")
    workers = [cluster.start("workers", "worker", JOB_COMPLETION_INDEX=str(index)) for index in range(2)]
    cluster.until(lambda: mlflow.poll() is None and cluster.answers("5000", "/health"))
    lead = cluster.start("lead", "lead")
    assert [cluster.ended(process) for process in (lead, *workers)] == [0, 0, 0], cluster.logs()
    summary = json.loads((cluster.folder / "results/results/cluster/experiment_summary.json").read_text())
    assert len(summary["models"][0]["search"]["trials"]) >= 2 and summary["registered"]["version"]

    assert cluster.ended(cluster.start("predict", "fetch", initial=True)) == 0, cluster.logs()
    cluster.start("predict", "predict")
    cluster.until(lambda: cluster.answers("8000", "/ready"))
    asked = request.Request(
        f"http://127.0.0.1:{cluster.ports['8000']}/predict", json.dumps({"maps": [[[0, 1], [2, 1]]]}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with request.urlopen(asked, timeout=30) as answer:
        assert len(json.load(answer)["answers"]) == 1
