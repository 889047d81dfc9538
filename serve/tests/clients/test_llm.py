"""The command `llm`, with a server of this kind in its configuration."""

import os
import pathlib
import subprocess
import sys

import pytest
import yaml


@pytest.fixture
def llm(smollm2, tmp_path):
    """Runs `llm` with a folder of its own."""
    models = [{"model_id": "local", "model_name": "smollm2", "api_base": smollm2.v1}]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    program = pathlib.Path(sys.executable).with_name("llm")

    def run(*words):
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
        ran = subprocess.run(
            [program, *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


def test_answers_and_conversations(llm):
    ask = ["-m", "local", "-o", "temperature", "0", "-o", "max_tokens", "12"]
    assert "Paris" in llm(*ask, "What is the capital of France?")
    assert "Paris" in llm(*ask, "--no-stream", "What is the capital of France?")
    assert llm("-c", "-o", "max_tokens", "4", "And what is that of Italy?").strip()
    assert "local" in llm("models", "list")
