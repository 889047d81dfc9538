"""The files of deploy/ and the commands of docs/deploy.md are those of the programs."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from server import ROOT
from test_routers import ROUTERS

DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def options(request):
    """The options of `flashinfer serve`."""
    program = request.config.getoption("--flashinfer").resolve()
    shown = subprocess.run([program, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"(--[a-z-]+)", shown))


def manifests():
    return [
        manifest
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for manifest in yaml.safe_load_all(path.read_text())
    ]


def container(name):
    """The container of a workload, by its name."""
    (found,) = [
        container
        for manifest in manifests()
        if "template" in manifest.get("spec", {})
        for container in manifest["spec"]["template"]["spec"]["containers"]
        if container["name"] == name
    ]
    return found


def test_options_are_those_of_the_program(options):
    words = (DEPLOY / "flashinfer.service").read_text() + (DEPLOY / "Containerfile").read_text()
    used = re.findall(r"(?<=[\s\"])--(?!from|system|create|home|release)[a-z-]+", re.sub(r"(?m)^#.*", "", words))
    used += [argument.split("=")[0] for argument in container("flashinfer")["args"] if argument.startswith("--")]
    assert "--drain-timeout" in used and set(used) <= options, set(used) - options


def test_the_routers_options_are_its_own():
    program = pathlib.Path(sys.executable).with_name("vllm-router")
    shown = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    used = [argument.split("=")[0] for argument in container("router")["args"] if argument.startswith("--")]
    assert used and set(used) <= set(re.findall(r"--[a-z-]+", shown))


def test_probes_ask_what_the_server_answers(simulated):
    replica = container("flashinfer")
    for probe, path in [("livenessProbe", "/health"), ("readinessProbe", "/ready")]:
        asked = replica[probe]["httpGet"]
        assert asked == {"path": path, "port": "http"}
        simulated.wait_for(path, 5)
    pod = next(manifest for manifest in manifests() if manifest["kind"] == "StatefulSet")["spec"]["template"]["spec"]
    drain = next(int(arg.split("=")[1]) for arg in replica["args"] if arg.startswith("--drain-timeout="))
    waits = replica["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > drain + waits


def test_workers_of_the_router_are_the_replicas():
    replicas = next(manifest for manifest in manifests() if manifest["kind"] == "StatefulSet")
    name, count = replicas["metadata"]["name"], replicas["spec"]["replicas"]
    service, port = replicas["spec"]["serviceName"], replicas["spec"]["template"]["spec"]["containers"][0]["ports"][0]
    args = container("router")["args"]
    workers = args[args.index("--worker-urls") + 1 :]
    assert workers == [f"http://{name}-{number}.{service}:{port['containerPort']}" for number in range(count)]


def test_the_routers_commands_are_those_that_are_tested():
    text = " ".join((ROOT / "docs" / "deploy.md").read_text().replace("\\\n", " ").split())
    for command in ROUTERS.values():
        assert " ".join(command) in text, command
    pinned = pathlib.Path(__file__).with_name("requirements.txt").read_text()
    for name in ROUTERS:
        assert re.search(rf"(?m)^{name}==\S+$", pinned)[0] in text


def test_the_unit_is_one(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("skipped for want of systemd-analyze")
    unit = (DEPLOY / "flashinfer.service").read_text().replace("/usr/local/bin/flashinfer", sys.executable)
    (tmp_path / "flashinfer.service").write_text(unit)
    ran = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "flashinfer.service"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0 and "flashinfer.service" not in ran.stderr, ran.stderr
