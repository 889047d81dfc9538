"""Load generators: llama-benchy, and benches/serving.py of this repository."""

import http.server
import json
import pathlib
import subprocess
import sys
import threading

import pytest
import tokenizers
from server import ROOT

BOOK = "It was a bright cold day, and the clocks of the town were striking. " * 200


@pytest.fixture
def book():
    """The address of a text."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BOOK.encode())

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/book.txt"
        server.shutdown()


def run(*command, env=None):
    ran = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_llama_benchy(simulated, model, book, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]"])
    tokenizer.train_from_iterator([BOOK], words)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = tmp_path / "result.json"
    program = pathlib.Path(sys.executable).with_name("llama-benchy")
    run(
        program, "--base-url", simulated.v1, "--model", model, "--tokenizer", tmp_path / "tokenizer.json",
        "--book-url", book, "--pp", "64", "--tg", "16", "--concurrency", "1", "4", "--runs", "2",
        "--exact-tg", "--skip-coherence", "--exit-on-first-fail", "--format", "json", "--save-result", result,
        env={"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )  # fmt: skip
    measured = json.loads(result.read_text())["benchmarks"]
    assert [row["concurrency"] for row in measured] == [1, 4]
    assert all(row["tg_throughput"]["mean"] > 0 for row in measured)


def test_benchmark_of_this_repository(simulated, request, tmp_path):
    result, program = tmp_path / "serving-test.json", request.config.getoption("--flashinfer").resolve()
    small = ["--clients", "1", "4", "--prompt-words", "20", "--answer-tokens", "12", "--json", result]
    run(sys.executable, "benches/serving.py", "--url", f"other={simulated.url}", *small)
    own = ["--flashinfer", program, "--model", "smollm2", "--device", "simulated"]
    run(sys.executable, "benches/serving.py", *own, *small)
    measured = json.loads(result.read_text())
    assert list(measured) == ["other", "flashinfer"]
    for row in measured["flashinfer"]["rows"]:
        assert row["requests"] == 32
        assert row["tokens_per_second"] == pytest.approx(32 * 12 / row["seconds"])
        first, whole = (row[key]["median"] for key in ("time_to_first_token_ms", "request_ms"))
        assert 0 < first < whole
    # As `--steps` adds it on a GPU.
    measured["flashinfer"]["steps_ms"] = {"4": 2.5}
    result.write_text(json.dumps(measured))
    run(sys.executable, "benches/serving_report.py", result, "--folder", tmp_path)
    page = (tmp_path / "serving.md").read_text()
    assert "| flashinfer | 4 | 32 |" in page and "| 2.500 |" in page
    assert (tmp_path / "serving-test-tokens.svg").read_text().startswith("<svg")
