"""Servers for tests with real clients, on loopback. CONTRIBUTING.md says how they are run."""

import itertools
import os
import pathlib

import openai
import pytest
import tiny_model
from server import ROOT, Server

TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def pytest_addoption(parser):
    parser.addoption("--flashinfer", type=pathlib.Path, default=TARGET / "release" / "flashinfer", help="the program")
    parser.addoption("--large-bodies", type=int, default=3, help="how many test_bounds.py sends at a time")
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
def serve_simulated(serve, tmp_path_factory):
    """Starts servers of the stand-in that computes no model: they are fast, and say nonsense."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    tiny_model.write(path)

    def start(*options):
        return serve(path, "--device", "simulated", *options)

    return start


@pytest.fixture(scope="session")
def simulated(serve_simulated):
    return serve_simulated().ready()


@pytest.fixture(scope="session")
def smollm2(serve):
    """A server of SmolLM2 on the CPU."""
    return serve("smollm2", "--device", "cpu").ready()


def client_of(server, key="none"):
    return openai.OpenAI(base_url=server.v1, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def client(simulated):
    return client_of(simulated)


@pytest.fixture(scope="session")
def model(client):
    """The name of the stand-in's model."""
    return client.models.list().data[0].id
