"""Writes expected.json: what jinja2, set up as Hugging Face transformers sets it up, makes of
the chats in chats.json with each template here.

    pip install jinja2 && python3 make.py

Sources of the templates: smollm2 is that of SmolLM2-135M-Instruct's GGUF file; phi4, phi3-small,
openchat3.5, mistral-v1 and mistral-v3 are in llama.cpp's tests/test-chat-template.cpp, all others
in its models/templates (MIT licence), which has them from the models' own repositories.
"""

import datetime
import json
import pathlib
import re

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2026, 7, 6, 9, 5, 3)
# What begins and ends texts.
ENDS = {
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "qwen2.5": ["<|endoftext|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_end|>"],
    "llama3.1": ["<|begin_of_text|>", "<|eot_id|>"],
    "llama3.2": ["<|begin_of_text|>", "<|eot_id|>"],
    "mistral-nemo": ["<s>", "</s>"],
    "mistral-v1": ["<s>", "</s>"],
    "mistral-v3": ["<s>", "</s>"],
    "gemma2": ["<bos>", "<eos>"],
    "phi3.5": ["<s>", "<|endoftext|>"],
    "phi3-small": ["<|endoftext|>", "<|endoftext|>"],
    "phi4": ["<|endoftext|>", "<|im_end|>"],
    "deepseek-r1-llama": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    "deepseek-r1-qwen": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    "gpt-oss": ["<|startoftext|>", "<|return|>"],
    "smollm3": ["<|begin_of_text|>", "<|im_end|>"],
    "granite3.3": ["<|end_of_text|>", "<|end_of_text|>"],
    "hermes2-tools": ["<|begin_of_text|>", "<|im_end|>"],
    "openchat3.5": ["<s>", "<|end_of_turn|>"],
}
MARK = re.compile(r"<\|[a-z_0-9]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]")


class Generation(Extension):
    """`{% generation %}` only tells a trainer what an answer is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def main():
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    chats = json.loads((HERE / "chats.json").read_text())
    expected = []
    for name, (bos, eos) in ENDS.items():
        source = (HERE / f"{name}.jinja").read_text()
        control = set(MARK.findall(source)) | {bos, eos}
        if "'<|' + message" in source:
            control |= {"<|system|>", "<|user|>", "<|assistant|>"}
        template = environment.from_string(source)
        texts = {}
        for chat in chats:
            variables = {"add_generation_prompt": True, **chat, **chat.get("variables", {})}
            variables = {key: value for key, value in variables.items() if key not in ("name", "variables")}
            try:
                text = {"text": template.render(**variables, bos_token=bos, eos_token=eos)}
            except jinja2.exceptions.TemplateError as error:
                text = {"error": str(error)}
            except TypeError:
                # What the template itself gets wrong, with words of Python's.
                text = {"error": ""}
            texts[chat["name"]] = text
        expected.append({"name": name, "bos": bos, "eos": eos, "control": sorted(control), "chats": texts})
    (HERE / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n")


main()
