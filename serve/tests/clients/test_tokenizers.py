"""Ids of SmolLM2 beside those of Hugging Face's tokenizers."""

import json
import random
import re
import subprocess
import urllib.request

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

PARTS = [
    "the", " of", "Hello", "don't", "we'LL", "naïve", "Äpfel", "日本語", "Привет", "עברית", "ﷺ", "👩‍👩‍👧", "🦙", "e\u0301",
    "0", "7", "1234567890", "3.14", "½", "²", "௧", " ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u3000", "\u200b",
    ".", "...", "?!", "(", ")]}", "->", "::", "_", "\\", "'", '"', "\x00", "\x7f", "\ufffd", "<|im_start|>", "http://a.b/c?d=e",
]  # fmt: skip
TEXTS = 2000


@pytest.fixture
def reference(request):
    """The tokenizer that the model was published with, of the vocabulary of its file."""
    program = request.config.getoption("--flashinfer").resolve()
    shown = subprocess.run([program, "show", "smollm2"], check=True, capture_output=True, text=True).stdout
    fields = gguf.GGUFReader(re.search(r"^file +(.*) \(", shown, re.MULTILINE).group(1)).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def test_ids_are_those_of_tokenizers(smollm2, reference):
    for _ in range(TEXTS):
        text = "".join(random.choices(PARTS, k=random.randint(1, 40)))
        body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
        asked = urllib.request.Request(smollm2.url + "/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert json.load(answer)["tokens"] == reference.encode(text).ids, repr(text)
