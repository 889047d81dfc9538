"""Servers for tests with real clients, on loopback. CONTRIBUTING.md says how they are run."""

import itertools
import os
import pathlib

import openai
import pytest
from server import Server

ROOT = pathlib.Path(__file__).resolve().parents[3]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))

# The stand-in that computes no model.
SIMULATED = ("--device", "simulated")


def pytest_addoption(parser):
    parser.addoption("--flashinfer", type=pathlib.Path, default=TARGET / "release" / "flashinfer", help="the program")
    parser.addoption("--load-seconds", type=float, default=10, help="how long test_load.py goes on")


@pytest.fixture(scope="session")
def serve(request, tmp_path_factory):
    """Starts servers with options, which end with the session."""
    program = request.config.getoption("--flashinfer").resolve()
    assert program.is_file(), f"{program} is missing; build it, or name it by --flashinfer"
    logs, numbers, servers = tmp_path_factory.mktemp("servers"), itertools.count(), []

    def start(*options):
        servers.append(Server(program, logs / f"{next(numbers)}.log", *options))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="session")
def simulated(serve):
    """A server of the stand-in: fast, and what it says is nonsense."""
    return serve(*SIMULATED).ready()


@pytest.fixture(scope="session")
def smollm2(serve):
    """A server of SmolLM2 on the CPU."""
    return serve("smollm2", "--device", "cpu").ready()


def client_of(server):
    return openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def client(simulated):
    return client_of(simulated)


@pytest.fixture(scope="session")
def model(client):
    """The name of the stand-in's model."""
    return client.models.list().data[0].id
