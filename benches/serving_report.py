"""Tables and plots of what `benches/serving.py` measured.

    python3 benches/serving_report.py RESULT.json … [--folder docs/benchmarks]

writes serving.md, with a section for each file, and two SVG files for each beside it. Needs nothing
but Python's standard library.
"""

import argparse
import json
import pathlib

from report import COLOURS, bars, cell, ratio, table

# The most that the server may add to the engine's own step, and with how many clients.
MOST_OF_STEP, TARGET_CLIENTS = 1.05, 64

INTRODUCTION = """# Serving

Requests and tokens per second, time to the first token, and inter-token latency of servers under
load: so many clients, each of which sends one request after another and reads its stream. Servers of
a section ran on one machine, one after another, with the same weights. `benches/serving.py` measures,
`benches/serving_report.py` makes this page; numbers differ between machines, so compare within a
section.

*Inter-token latency* is the time between two pieces of text of a stream, *request* that from sending
it to the end. *Engine's step* is what `flashinfer bench --steps` says of as many requests with no
server above, and */ step* the median inter-token latency beside it: what HTTP, text and scheduling
add.

llama.cpp's server divides its cache among as many slots as a section has clients at most (`-np`), and
is slower with more of them: sections of one number of clients show it with as many slots as it
needs.

*PyTorch* is no server (`benches/torch_batch.py`) but a batch of as many requests, which begin together
and are equally long, so that none waits while another's prompt is read: layers compiled, a step one
CUDA graph over a static cache, random weights of the model's shape in `f16`. The Llama's weights are
random everywhere (`benches/random_gguf.py`).
"""


def rows(results):
    for name, result in results.items():
        for row in result["rows"]:
            yield name, row, result["steps_ms"].get(str(row["clients"]))


def median(row, key):
    return row[key] and row[key]["median"]


def measurements(results):
    lines = []
    for name, row, step in rows(results):
        latency = median(row, "inter_token_latency_ms")
        lines.append([
            name, str(row["clients"]), str(row["requests"]), cell(row["requests_per_second"], "{:.1f}"),
            cell(row["tokens_per_second"], "{:.0f}"), cell(median(row, "time_to_first_token_ms")),
            cell(row["time_to_first_token_ms"]["p99"]), cell(latency, "{:.3f}"),
            cell(row["inter_token_latency_ms"] and row["inter_token_latency_ms"]["p99"], "{:.3f}"),
            cell(median(row, "request_ms"), "{:.1f}"), cell(step, "{:.3f}"), cell(ratio(latency, step)),
        ])  # fmt: skip
    return table(
        ["server", "clients", "requests", "requests/s", "tokens/s", "first token ms", "p99", "inter-token ms", "p99",
         "request ms", "engine's step ms", "/ step"],
        lines,
    )  # fmt: skip


def target(results):
    """Whether the server adds as little as it should."""
    found = [
        (name, ratio(median(row, "inter_token_latency_ms"), step))
        for name, row, step in rows(results)
        if step and row["clients"] == TARGET_CLIENTS
    ]
    if not found:
        return f"The engine's step beside {TARGET_CLIENTS} clients was not measured."
    verdicts = [f"{name} {value:.3f}, {'met' if value <= MOST_OF_STEP else 'missed'}" for name, value in found]
    limit = f"with {TARGET_CLIENTS} clients, at most {MOST_OF_STEP:g} of the engine's step"
    return f"Target: {limit}: {'; '.join(verdicts)}."


def plot(results, title, unit, value):
    """Bars of all servers, side by side for each number of clients."""
    counts = sorted({row["clients"] for _, row, _ in rows(results)})
    groups = [
        (f"{count} clients", {name: value(row) for name, row, _ in rows(results) if row["clients"] == count})
        for count in counts
    ]
    return bars(title, unit, groups, colours=dict(zip(results, COLOURS.values())))


def section(path, folder):
    results = json.loads(path.read_text())
    first = next(iter(results.values()))
    prompt, answer = first["rows"][0]["prompt_tokens"], first["rows"][0]["answer_tokens"]
    text = f"\n## {path.stem}\n\n{first['date']}. Prompts of about {prompt:.0f} tokens, answers of {answer}.\n"
    text += f"{target(results)}\n\n{measurements(results)}\n"
    if len({row["clients"] for _, row, _ in rows(results)}) == 1:
        return text
    for kind, title, unit, value in [
        ("tokens", "Tokens per second", "tokens/s", lambda row: row["tokens_per_second"]),
        ("first-token", "Median time to first token", "ms", lambda row: median(row, "time_to_first_token_ms")),
    ]:
        name = f"{path.stem}-{kind}.svg"
        (folder / name).write_text(plot(results, title, unit, value))
        text += f"\n![{title}]({name})\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=pathlib.Path, nargs="+")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    args = parser.parse_args()
    page = INTRODUCTION + "".join(section(path, args.folder) for path in args.results)
    (args.folder / "serving.md").write_text(page)


if __name__ == "__main__":
    main()
