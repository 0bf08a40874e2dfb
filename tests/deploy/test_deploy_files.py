"""Files of deploy/ that nothing here executes: linted, held against schemas and each other."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = DEPLOY / "compose"
UNIT = DEPLOY / "systemd" / "vllm-precalib@.service"
LABEL = {"app.kubernetes.io/name": "precalib"}
KUBERNETES_VERSION = "1.34"
EXPOSURE = 1.5  # of the unit, as systemd-analyze counts it; 0 is none, 10 is all


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def base():
    """Every object of the base, by kind and name."""
    kustomization = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())
    files = kustomization["resources"]
    there = {path.name for path in (KUBERNETES / "base").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(files) == there
    found = [document for file in files for document in documents(KUBERNETES / "base" / file)]
    return {(object_["kind"], object_["metadata"]["name"]): object_ for object_ in found}


def merged(into, patch):
    """A strategic merge: lists of named entries by their name, other values replaced."""
    if isinstance(into, dict) and isinstance(patch, dict):
        return {
            k: merged(into[k], patch[k]) if k in into and k in patch else {**into, **patch}[k]
            for k in {**into, **patch}
        }
    named = isinstance(into, list) and all(isinstance(e, dict) and "name" in e for e in into)
    if named and all("name" in entry for entry in patch):
        ours = {entry["name"]: entry for entry in into}
        for entry in patch:
            ours[entry["name"]] = merged(ours.get(entry["name"], {}), entry)
        return list(ours.values())
    return patch


def gpu():
    (patch,) = documents(KUBERNETES / "gpu" / "statefulset.yaml")
    return merged(base()["StatefulSet", "precalib"], patch)


def pods():
    """Every pod that is described: base, GPU, and leader and worker of several machines."""
    (group,) = documents(KUBERNETES / "leaderworkerset.yaml")
    template = group["spec"]["leaderWorkerTemplate"]
    return {
        "base": base()["StatefulSet", "precalib"]["spec"]["template"],
        "gpu": gpu()["spec"]["template"],
        "leader": template["leaderTemplate"],
        "worker": template["workerTemplate"],
    }


def test_yaml(tool):
    tool("yamllint", "--strict", "--config-file", DEPLOY / ".yamllint", DEPLOY)


def test_shell_scripts(tool):
    tool("shellcheck", *DEPLOY.glob("*.sh"), ROOT / ".ci" / "run")


def test_dockerfiles(tool):
    tool("hadolint", DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cpu")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_a_base_image_can_be_pinned_by_its_digest(name):
    text = (DEPLOY / name).read_text()
    assert re.search(r"^ARG BASE=\S+:v[\d.]+\S*$", text, re.MULTILINE)
    assert "FROM ${BASE}${DIGEST:+@$DIGEST}\n" in text
    assert re.search(r"^USER 2000:0$", text, re.MULTILINE)


def test_compose_file_fits_its_schema(tool):
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE / "compose.yaml")


def test_compose_services_are_hardened_and_mount_what_is_there():
    compose = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["profiles"], name
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("./"):
                assert (COMPOSE / volume.partition(":")[0]).exists(), volume
        for port in service.get("ports", ()):
            assert "127.0.0.1" in port, name
    servers = [compose["services"][f"server-{kind}"] for kind in ("cpu", "gpu")]
    for server in servers:
        assert "ports" not in server
        assert list(server["networks"]) == ["inside"]
        assert (ROOT / server["build"]["dockerfile"]).is_file()
    assert compose["networks"]["inside"]["internal"]


def test_kubernetes_objects_fit_their_schemas(tool, tmp_path):
    objects = [*base().values(), gpu()]
    for name, pod in pods().items():
        metadata = {"name": name, "labels": pod["metadata"].get("labels", {})}
        objects.append(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
        )
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    said = tool("kubernetes-validate", "--strict", "-k", KUBERNETES_VERSION, file)
    assert said.count("passed") == len(objects), said


@pytest.mark.parametrize("name", ["base", "gpu", "leader", "worker"])
def test_pods_are_hardened(name):
    spec = pods()[name]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {volume["name"] for volume in spec["volumes"]} | {"cache"}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts.keys() <= volumes
        assert mounts["model"]["readOnly"]
        assert {mounts[name]["mountPath"] for name in ("cache", "temporary", "shared-memory")} == {
            "/home/vllm/.cache",
            "/tmp",
            "/dev/shm",
        }


@pytest.mark.parametrize("name", ["base", "gpu", "leader"])
def test_pods_that_answer_have_probes_and_time_to_end(name):
    spec = pods()[name]["spec"]
    (container,) = spec["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    argument = next(text for text in container["args"] if text.startswith("--shutdown-timeout="))
    pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert spec["terminationGracePeriodSeconds"] > int(argument.partition("=")[2]) + pause


def test_selectors_find_the_pods():
    objects = base()
    stateful = objects["StatefulSet", "precalib"]["spec"]
    assert stateful["template"]["metadata"]["labels"] == LABEL
    assert stateful["selector"] == {"matchLabels": LABEL}
    assert objects["PodDisruptionBudget", "precalib"]["spec"]["selector"] == {"matchLabels": LABEL}
    assert objects["NetworkPolicy", "precalib"]["spec"]["podSelector"] == {"matchLabels": LABEL}
    for name in ("precalib", stateful["serviceName"]):
        assert objects["Service", name]["spec"]["selector"] == LABEL


def test_the_gpu_patch_changes_what_it_should():
    (before,), (after,) = (pods()[name]["spec"]["containers"] for name in ("base", "gpu"))
    assert after["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": "1"}
    assert after["env"] == before["env"]
    assert after["image"] == "vllm-precalib"


def metrics_in(text):
    return set(re.findall(r"\b(?:vllm:|precalib_)[a-z0-9_]+", text))


def test_dashboard_and_alerts_ask_for_metrics_that_exist():
    """A counter's name ends in _total and a histogram's in _bucket where Prometheus reads them."""
    import importlib.util

    folder = Path(importlib.util.find_spec("vllm").origin).parent / "v1"
    source = "".join(path.read_text() for path in folder.rglob("*.py"))
    ours = (ROOT / "vllm_precalib" / "endpoint" / "metrics.py").read_text()
    defined = set(re.findall(r'"((?:vllm:|precalib_)[a-z0-9_]+)"', source + ours))
    dashboard = json.loads((COMPOSE / "grafana" / "dashboards" / "precalib.json").read_text())
    wanted = {t["expr"] for panel in dashboard["panels"] for t in panel["targets"]}
    wanted |= {
        r["expr"] for g in documents(COMPOSE / "alerts.yaml")[0]["groups"] for r in g["rules"]
    }
    names = metrics_in(" ".join(wanted))
    assert len(names) > 10
    unknown = {name for name in names if re.sub(r"_(total|bucket)$", "", name) not in defined}
    assert unknown == set()


def test_panels_do_not_overlap():
    dashboard = json.loads((COMPOSE / "grafana" / "dashboards" / "precalib.json").read_text())
    taken = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    (source,) = documents(COMPOSE / "grafana/provisioning/datasources/prometheus.yaml")
    known = {source["datasources"][0]["uid"]}
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == known


if shutil.which("systemd-analyze"):  # no part of set-up: the tests are there where systemd is

    def test_the_unit_is_right(tool, tmp_path):
        unit = tmp_path / UNIT.name
        unit.write_text(UNIT.read_text().replace("/opt/vllm-precalib/bin/vllm", "/bin/true"))
        said = tool("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit)
        assert said == ""

    def test_the_unit_is_confined(tool):
        limit = f"--threshold={10 * EXPOSURE:g}"
        said = tool("systemd-analyze", "security", "--offline=yes", "--no-pager", limit, UNIT)
        assert "Overall exposure level" in said
