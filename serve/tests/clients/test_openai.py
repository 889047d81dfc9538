"""OpenAI's own client: answers, streams, errors, and clients that leave."""

import itertools
import json

import openai
import pytest
from conftest import client_of

HELLO = [{"role": "user", "content": "Say something."}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:"}}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def chat(client, model, **options):
    return client.chat.completions.create(**{"model": model, "messages": HELLO, "temperature": 0, **options})


def test_a_model_answers(smollm2):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = chat(client_of(smollm2), "smollm2", messages=question, max_tokens=16)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert 0 < usage.completion_tokens < 16
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.object == "chat.completion" and answer.id and answer.created > 0
    assert answer._request_id


def test_a_stream_is_the_whole_answer_in_pieces(client, model):
    whole = chat(client, model, max_tokens=20)
    chunks = list(chat(client, model, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    reasons = [piece.choices[0].finish_reason for piece in pieces]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert last.choices == [] and all(piece.usage is None for piece in pieces)
    counts = [(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) for usage in (whole.usage, last.usage)]
    assert counts[0] == counts[1]
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_prompt_that_was_read_is_cached(client, model):
    asked = dict(model=model, prompt="Words that nobody has said before. " * 20, max_tokens=2)
    first, second = (client.completions.create(**asked).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_several_answers(client, model):
    """The same seed, the same answers; each of them another."""
    drawn = dict(n=3, seed=7, temperature=1.0, max_tokens=12)
    answers = chat(client, model, **drawn)
    assert [choice.index for choice in answers.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answers.choices]
    assert len(set(texts)) == 3
    streamed = [""] * 3
    for chunk in chat(client, model, stream=True, **drawn):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_log_probabilities(client, model):
    answer = chat(client, model, logprobs=True, top_logprobs=3, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        best = [top.logprob for top in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        # It is greedy.
        assert token.logprob == best[0] <= 0 and token.token == token.top_logprobs[0].token
    text = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert text == answer.choices[0].message.content
    chunks = chat(client, model, logprobs=True, top_logprobs=3, max_tokens=5, stream=True)
    streamed = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [token.logprob for token in itertools.chain(*streamed)] == [token.logprob for token in tokens]


def test_completions_continue_texts_and_tokens(client, model):
    asked = dict(model=model, max_tokens=4, temperature=0)
    alone = [client.completions.create(prompt=prompt, **asked).choices[0].text for prompt in ("One", "Two")]
    both = client.completions.create(prompt=["One", "Two"], **asked)
    assert [choice.text for choice in both.choices] == alone
    assert [choice.index for choice in both.choices] == [0, 1]
    echoed = client.completions.create(prompt="One", echo=True, **asked)
    assert echoed.choices[0].text == "One" + alone[0]
    scored = client.completions.create(prompt="One", logprobs=2, **asked).choices[0]
    assert len(scored.logprobs.tokens) == len(scored.logprobs.token_logprobs) == len(scored.logprobs.text_offset)
    assert all(len(top) >= 1 for top in scored.logprobs.top_logprobs)
    # As evaluations of models score texts.
    prompt = client.completions.create(prompt="One", echo=True, logprobs=2, **{**asked, "max_tokens": 0}).choices[0]
    assert prompt.text == "One" and prompt.logprobs.token_logprobs[0] is None
    assert len(prompt.logprobs.tokens) == len(prompt.logprobs.token_logprobs)
    assert all(logprob <= 0 for logprob in prompt.logprobs.token_logprobs[1:])
    tokens = client.completions.create(prompt=[5, 6, 7], **asked)
    assert tokens.usage.prompt_tokens == 3


def test_stop_strings_are_not_said(client, model):
    whole = chat(client, model, max_tokens=30).choices[0].message.content
    stop = whole[10:14]
    answer = chat(client, model, max_tokens=30, stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    chunks = chat(client, model, max_tokens=30, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.message.content


@pytest.mark.parametrize(
    "options, param",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1 << 70}, "n"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": openai.omit, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"frequency_penalty": -9}, "frequency_penalty"),
        ({"logit_bias": {"1": 200}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"top_logprobs": 1000, "logprobs": True}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"seed": "seven"}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "messages"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tools": [{"type": "hammer"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"top_k": -7}}, "top_k"),
        ({"extra_body": {"min_tokens": 10}, "max_tokens": 5}, "min_tokens"),
    ],
)
def test_what_is_wrong_is_named(client, model, options, param):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, model, **{"max_tokens": 4, **options})
    said = error.value
    assert said.type == "invalid_request_error" and said.message
    assert said.param.split(".")[0].split("[")[0] == param, said.body


def test_a_prompt_that_is_too_long_is_refused_with_its_size(client, model):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, model, messages=[{"role": "user", "content": "many words " * 100_000}])
    assert "context length" in str(error.value) and error.value.param == "messages"


def test_models_that_are_not_there(client, model):
    assert client.models.retrieve(model).id == model
    for ask in (lambda: chat(client, "gpt-6"), lambda: client.models.retrieve("gpt-6")):
        with pytest.raises(openai.NotFoundError) as error:
            ask()
        assert "gpt-6" in str(error.value) and error.value.code == "model_not_found"


def test_keys(serve_simulated):
    server = serve_simulated("--api-key", "open-sesame").ready()
    with pytest.raises(openai.AuthenticationError):
        client_of(server).models.list()
    assert client_of(server, "open-sesame").models.list().data


def test_a_client_that_leaves_gives_its_pages_back(simulated, client, model):
    simulated.wait_until_idle()
    endless = {"extra_body": {"ignore_eos": True}, "max_tokens": 4000}
    streams = [chat(client, model, stream=True, n=2, **endless) for _ in range(8)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    assert simulated.load() == 16 and simulated.metric("vllm:kv_cache_usage_perc") > 0
    for stream in streams:
        stream.close()
    simulated.wait_until_idle(5)
    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        chat(impatient, model, **endless)
    simulated.wait_until_idle(5)


def test_answers_have_the_schema(client, model):
    asked = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
    for seed in range(4):
        answer = chat(client, model, response_format=asked, temperature=1.0, seed=seed, max_tokens=400).choices[0]
        assert answer.finish_reason == "stop"
        thing = json.loads(answer.message.content)
        assert set(thing) == {"name", "size"} and thing["size"] in ("small", "large") and len(thing["name"]) <= 8
    drawn = dict(temperature=1.0, seed=3, max_tokens=300)
    answer = chat(client, model, response_format={"type": "json_object"}, **drawn).choices[0]
    assert answer.message.content.lstrip()[0] == "{"
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_are_called(client, model, choice):
    asked = dict(tools=[WEATHER], tool_choice=choice, temperature=1.0, seed=1, max_tokens=400)
    answer = chat(client, model, **asked).choices[0]
    (call,) = answer.message.tool_calls
    assert call.type == "function" and call.id and call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
    name = arguments = ""
    for chunk in chat(client, model, stream=True, **asked):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_a_conversation_with_a_tool(client, model):
    """Messages as they come back from a program that has called its function."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = HELLO + [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = chat(client, model, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=5)
    assert answer.choices[0].message.content is not None and not answer.choices[0].message.tool_calls
