"""LiteLLM, which talks to servers of this kind as `hosted_vllm` and as `openai`."""

import litellm
import pytest

HELLO = [{"role": "user", "content": "Say something."}]


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_answers_and_streams(simulated, model, provider):
    asked = dict(
        model=f"{provider}/{model}", api_base=simulated.v1, api_key="none", messages=HELLO, max_tokens=12,
        temperature=0, num_retries=0,
    )  # fmt: skip
    answer = litellm.completion(**asked)
    assert answer.usage.completion_tokens > 0
    chunks = list(litellm.completion(stream=True, **asked))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == answer.choices[0].message.content


def test_errors_keep_their_kind(simulated, model):
    asked = dict(api_base=simulated.v1, api_key="none", messages=HELLO, num_retries=0)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(model=f"hosted_vllm/{model}", temperature=-1, **asked)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="hosted_vllm/gpt-6", **asked)
