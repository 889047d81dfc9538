"""The load of `load.py` with the stand-in. `--load-seconds` says for how long."""

import load
import pytest


@pytest.mark.timeout(600)
def test_load(serve_simulated, request):
    print(load.check(serve_simulated().ready(), request.config.getoption("--load-seconds")))
