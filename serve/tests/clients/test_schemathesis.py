"""Schemathesis: requests of all kinds by what /openapi.json says, and answers held against it."""

import pathlib
import subprocess
import sys


OPTIONS = ["--max-examples", "40", "--seed", "1", "--request-timeout", "20", "--workers", "2", "--no-color"]


def test_the_document_is_true(serve_simulated, tmp_path):
    # What says no length of its answer ends soon enough, too.
    server = serve_simulated("--cache-tokens", "1024").ready()
    program = pathlib.Path(sys.executable).with_name("schemathesis")
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
        "unsupported_method,allow_header_conformance,negative_data_rejection,ignored_auth"
    )
    ran = subprocess.run(
        [program, "run", server.url + "/openapi.json", "--checks", checks, *OPTIONS],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    server.wait_until_idle()
