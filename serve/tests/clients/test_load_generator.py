"""Load generators: llama-benchy, and benches/serving.py of this repository."""

import http.server
import json
import pathlib
import subprocess
import sys
import threading

import pytest
import tokenizers
from conftest import ROOT

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


def test_benchmark_of_this_repository(simulated, tmp_path):
    result, steps = tmp_path / "serving-test.json", tmp_path / "steps.txt"
    steps.write_text("| batch | step ms | host ms |\n|---|---|---|\n| 4 | 2.500 | 1 |\n")
    for name in ("one", "two"):
        run(
            sys.executable, "benches/serving.py", "--name", name, "--url", simulated.url, "--clients", "1", "4",
            "--requests", "2", "--prompt-words", "20", "--answer-tokens", "12", "--json", result, "--steps", steps,
        )  # fmt: skip
    measured = json.loads(result.read_text())
    assert list(measured) == ["one", "two"]
    for row in measured["one"]["rows"]:
        assert row["requests"] == row["clients"] * 2
        assert row["tokens_per_second"] == pytest.approx(row["requests"] * 12 / row["seconds"])
        first, request = (row[key]["median"] for key in ("time_to_first_token_ms", "request_ms"))
        assert 0 < first < request
    run(sys.executable, "benches/serving_report.py", result, "--folder", tmp_path)
    page = (tmp_path / "serving.md").read_text()
    assert "| two | 4 | 8 |" in page and "2.500" in page
    assert (tmp_path / "serving-test-tokens.svg").read_text().startswith("<svg")
