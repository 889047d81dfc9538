"""Tables and plots of what the benchmark `kernels` measured.

    python3 benches/report.py RESULT.json [FOLDER]

writes README.md and three SVG files to the folder, by default docs/benchmarks.
Needs nothing but Python's standard library.
"""

import datetime
import html
import json
import pathlib
import re
import sys

# The targets, as ratios in one run.
MOST_OF_ONE_LAUNCH, MOST_OF_DECODE, MOST_OF_PLAN, MOST_OF_GPU = 1.15, 1.25, 0.5, 1.02
LAYERS = 32

COLOURS = {"bare launches": "#9aa5b1", "module": "#e0a458", "this crate": "#c8553d", "Python": "#3c6e8f"}


def ratio(above, below):
    return above / below if above is not None and below else None


def cell(value, form="{:.2f}"):
    return "–" if value is None else form.format(value)


def percent(value):
    return cell(None if value is None else value * 100, "{:.0f} %")


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def bandwidth(case):
    """Bytes per second that a case has to move."""
    return ratio(case["bytes"], case["gpu"]["rust_us"] and case["gpu"]["rust_us"] * 1e-6)


def in_cache(result, case):
    """Whether replays may find most of it in the L2 cache."""
    return case["bytes"] is not None and case["bytes"] <= 2 * result["memory"]["l2_bytes"]


def planned(result):
    return [case for case in result["cases"] if case["plan"]]


def check(what, cases, ratio_of, most, alone=None):
    """One target: what it says, how many cases meet it, and which do not. `alone` is the ratio of
    FlashInfer's own function, which nothing that calls it can be below."""
    measured = [case for case in cases if ratio_of(case) is not None]
    missed = [case for case in measured if ratio_of(case) > most]
    verdict = "not measured"
    if measured:
        verdict = f"met by {len(measured) - len(missed)} of {len(measured)}"
        if len(measured) < len(cases):
            verdict += f" ({len(cases) - len(measured)} not measured)"
    if measured and not missed:
        verdict += f"; at most {max(map(ratio_of, measured)):.3g}"
    if missed:
        verdict += "; missed by " + ", ".join(f"{case['name']} ({ratio_of(case):.3f})" for case in missed)
    if missed and alone:
        theirs = sum(alone(case) is not None and alone(case) > most for case in missed)
        verdict += f". Of these {len(missed)}, the module's function alone misses it in {theirs}"
    return [what, f"≤ {most:g}", verdict]


def targets(result):
    cases = result["cases"]

    def of(kind):
        return [case for case in cases if case["kind"] == kind]

    def to(of, key, below):
        """The ratio of two times of a case."""
        return lambda case: ratio(case[of][key], case[of][below])

    enqueue, alone = to("run", "rust_us", "bare_us"), to("run", "raw_us", "bare_us")
    with_table = [case for case in planned(result) if case["plan"]["with_table_us"] is not None]

    return table(
        ["target", "ratio", "result"],
        [
            check(
                "enqueue an operation of one launch / a bare launch", of("one_launch"), enqueue,
                MOST_OF_ONE_LAUNCH, alone,
            ),
            check(
                "enqueue a decode (not latent attention's) / as many bare launches", of("decode"), enqueue,
                MOST_OF_DECODE, alone,
            ),
            check("plan / Python's plan", planned(result), to("plan", "rust_us", "python_us"), MOST_OF_PLAN),
            check(
                "plan, with the page table uploaded / Python's plan, without its page numbers", with_table,
                to("plan", "with_table_us", "python_us"), MOST_OF_PLAN,
            ),
            check(
                "GPU time / that of the same module from Python", cases, to("gpu", "rust_us", "python_us"),
                MOST_OF_GPU,
            ),
            check("heap allocations of a run by Rust code", cases, lambda case: case["allocations"], 0),
        ],
    )  # fmt: skip


def enqueue(result):
    rows = []
    for case in result["cases"]:
        run = case["run"]
        bare, raw, rust, python = (run[key] for key in ["bare_us", "raw_us", "rust_us", "python_us"])
        module = raw - bare if raw is not None and bare is not None else None
        own = rust - raw if raw is not None and rust is not None else None
        rows.append([
            case["name"], str(case["launches"]), cell(bare), cell(module, "{:+.2f}"), cell(own, "{:+.2f}"),
            cell(rust), cell(python), cell(ratio(raw, bare)), cell(ratio(rust, bare)),
            cell(ratio(rust, python)), cell(case["allocations"], "{:g}"),
        ])  # fmt: skip
    return table(
        ["case", "kernels", "bare launches µs", "+ the module µs", "+ this crate µs", "= Rust µs", "Python µs",
         "module / bare", "Rust / bare", "Rust / Python", "heap allocations"],
        rows,
    )  # fmt: skip


def plans(result):
    rows = []
    for case in planned(result):
        plan, run = case["plan"], case["run"]["rust_us"]
        whole = plan["with_table_us"] or plan["rust_us"]
        step = whole + LAYERS * run if whole and run else None
        rows.append([
            case["name"], cell(plan["raw_us"], "{:.1f}"), cell(plan["rust_us"], "{:.1f}"),
            cell(plan["again_us"], "{:.1f}"),
            cell(plan["with_table_us"], "{:.1f}"), cell(plan["busy_us"], "{:.1f}"),
            cell(plan["python_us"], "{:.1f}"), cell(ratio(plan["rust_us"], plan["python_us"])),
            cell(ratio(plan["with_table_us"], plan["python_us"])), percent(ratio(whole, step)),
        ])  # fmt: skip
    return table(
        ["case", "planner alone µs", "Rust µs", "the same batch again µs", "with the page table µs", "while the GPU works µs", "Python µs",
         "Rust / Python", "with the page table / Python", f"share of a step of {LAYERS} layers"],
        rows,
    )  # fmt: skip


def gpu(result):
    memory, rows = result["memory"], []
    for case in result["cases"]:
        rust, python = case["gpu"]["rust_us"], case["gpu"]["python_us"]
        shares = [ratio(bandwidth(case), memory[f"{of}_bytes_per_second"]) for of in ["peak", "copy"]]
        cached = in_cache(result, case)
        rows.append([
            case["name"], cell(rust), cell(python), cell(ratio(rust, python), "{:.3f}"),
            cell(case["bytes"] and case["bytes"] / 2**20, "{:.3f}" if cached else "{:.0f}"),
            *("in L2" if cached else percent(share) for share in shares),
        ])  # fmt: skip
    return table(
        ["case", "Rust µs", "Python µs", "Rust / Python", "MiB moved", "of the memory's peak", "of a copy"], rows
    )


def bare_range(result):
    """What a bare launch took, in the blocks of several cases."""
    times = [case["run"]["bare_us"] for case in result["cases"] if case["launches"] == 1]
    times = [time for time in times if time is not None]
    if len(times) < 2:
        return ""
    return f""" The same
bare launch took from {min(times):.2f} to {max(times):.2f} µs beside different cases; parts that are small or negative
are noise."""


def medians(result):
    """Over how many calls."""
    runs = [case["run"] for case in result["cases"] if case["run"]["blocks"]]
    if not runs:
        return "no blocks of calls"
    counts = [sorted({run[key] for run in runs}) for key in ["blocks", "calls"]]
    blocks, calls = (f"{of[0]} to {of[-1]}" if len(of) > 1 else str(of[0]) for of in counts)
    return f"{blocks} blocks of {calls} calls"


def bars(title, unit, groups, reference=None, colours=COLOURS):
    """Bars side by side, for each of `groups`: a name, and values by their names. The widest is
    the largest value, or the reference, a value and what it is."""
    groups = [(name, {key: value for key, value in values.items() if value is not None}) for name, values in groups]
    groups = [group for group in groups if group[1]]
    if not groups:
        return None
    left, right, bar, gap, top = 270, 90, 11, 10, 58
    plot = 560
    most = max(value for _, values in groups for value in values.values())
    most = max(most, reference[0]) if reference else most
    names = list(dict.fromkeys(key for _, values in groups for key in values))
    height = top + sum(len(values) * bar + gap for _, values in groups) + 14
    width = left + plot + right
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="14" font-weight="bold">{html.escape(title)}</text>',
    ]
    x = 12
    for name in names:
        out.append(f'<rect x="{x}" y="32" width="10" height="10" fill="{colours.get(name, "#c8553d")}"/>')
        out.append(f'<text x="{x + 14}" y="41">{html.escape(name)}</text>')
        x += 30 + 7 * len(name)
    y = top
    for name, values in groups:
        middle = y + len(values) * bar / 2 + 4
        out.append(f'<text x="{left - 8}" y="{middle:.0f}" text-anchor="end">{html.escape(name)}</text>')
        for key, value in values.items():
            length = max(value / most * plot, 1)
            out.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 1}" fill="{colours.get(key, "#c8553d")}"/>'
            )
            out.append(f'<text x="{left + length + 4:.1f}" y="{y + bar - 2}" font-size="9">{value:.3g} {unit}</text>')
            y += bar
        y += gap
    if reference:
        value, label = reference
        x = left + value / most * plot
        out.append(
            f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{height - 8}" stroke="#333" stroke-dasharray="3 3"/>'
        )
        out.append(f'<text x="{x:.1f}" y="{top - 9}" text-anchor="end" font-size="9">{html.escape(label)}</text>')
    return "\n".join(out + ["</svg>", ""])


def plots(result):
    names = {"bare launches": "bare_us", "module": "raw_us", "this crate": "rust_us", "Python": "python_us"}
    run = [(case["name"], {name: case["run"][key] for name, key in names.items()}) for case in result["cases"]]
    names = {"module": "raw_us", "this crate": "rust_us", "Python": "python_us"}
    plan = [(case["name"], {name: case["plan"][key] for name, key in names.items()}) for case in planned(result)]
    peak = result["memory"]["peak_bytes_per_second"]
    share = [
        (case["name"], {"this crate": ratio(bandwidth(case), peak / 100)})
        for case in result["cases"]
        if peak and case["kind"] == "decode" and not in_cache(result, case)
    ]
    return {
        "enqueue.svg": bars("Host time to enqueue one call", "µs", run),
        "plan.svg": bars("Host time of one plan", "µs", plan),
        "bandwidth.svg": bars("Decode: share of the memory's peak bandwidth", "%", share, (100, "peak")),
    }


def document(result, drawn):
    machine, versions = result["machine"], result["versions"]
    python = versions["python"]
    date = datetime.datetime.fromtimestamp(result["seconds_since_1970"], datetime.timezone.utc)
    peer = (
        f"FlashInfer {python['flashinfer']} on PyTorch {python['torch']}, Python {python['python']}"
        if python
        else f"not measured ({result['no_python']})"
    )
    # Where the file was written is nobody's business.
    words = [pathlib.PurePath(word).name if word.endswith(".json") else word for word in result["command"]]
    command = " ".join(["cargo bench --bench kernels --", *words])
    memory = result["memory"]
    peak = cell(memory["peak_bytes_per_second"] and memory["peak_bytes_per_second"] / 1e9, "{:.0f} GB/s")
    shape = result["shape"]
    images = {name: f"\n![{name.removesuffix('.svg')}]({name})\n" if text else "" for name, text in drawn.items()}
    reasons = {}
    notes = [(case["name"], note) for case in result["cases"] for note in case["notes"]]
    for name, reason in result["left_out"] + notes:
        reasons.setdefault(reason, []).append(name)
    left_out = "".join(f"- {', '.join(names)}: {reason}\n" for reason, names in reasons.items())
    left_out = f"\n## Left out, or without Python\n\n{left_out}" if left_out else ""
    return f"""\
# Benchmarks

What it costs to launch FlashInfer's kernels through this crate. This file and its plots
are made by two commands, on a machine with an NVIDIA GPU and, for the comparison,
FlashInfer's Python package with its modules:

```sh
{command}
python3 benches/report.py {next((word for word in words if word.endswith(".json")), "RESULT.json")}
```

| | |
|---|---|
| date | {date:%Y-%m-%d} |
| GPU | {machine["gpu"]}, driver {machine["driver"]} |
| CPU | {machine["cpu"]} |
| CUDA | runtime {machine["cuda_runtime"]}, driver for up to {machine["driver_cuda"]} |
| this crate | {versions["crate"]}, modules of {versions["modules"]}, TVM-FFI {versions["tvm_ffi"]} |
| Python | {peer} |
| memory | {peak} by clock and bus width; a copy reads and writes {memory["copy_bytes_per_second"] / 1e9:.0f} GB/s; L2 cache {memory["l2_bytes"] / 2**20:.0f} MiB |
| attention | {shape["qo_heads"]} query heads, {shape["kv_heads"]} KV heads, head_dim {shape["head_dim"]}, page {shape["page_size"]} |

Times do not carry over to another machine. Quote ratios, which are of one run: all that
is compared was measured in turn, block by block.

Beside these: [the time to a first result](cold-start.md), [a decode step of Llama 3 8B's
shape](llama-8b.md), [servers under load](serving.md), [FlashInfer 0.7.4](versions.md), [the CPU](cpu.md),
[a step of a small model beside PyTorch](../serve.md), [candle](../candle.md) and [what is downloaded and
embedded](../footprint.md). `cargo bench --bench host` measures
what this crate does on the host alone, on any machine.

## Targets

{targets(result)}

## Enqueueing

A call returns when its kernels are enqueued. The time is the median over {medians(result)},
which are too few to fill the launch queue, and has three parts:

- *bare launches*: as many `cudaLaunchKernel`s of an empty kernel as the call has kernels;
- *the module*: what FlashInfer's function adds when it is called again with arguments that
  are packed already: it checks them, and sets its launch up;
- *this crate*: packing, checks, setting the stream.

*Module / bare* is what no caller of the module can be below.{bare_range(result)}
Heap allocations are those of Rust code; what the modules' C++ allocates is not counted.
Python writes to tensors that are given where its functions take them; sampling takes none.

{enqueue(result)}
{images["enqueue.svg"]}
## Planning

Of the time of a plan, *planner alone* is FlashInfer's own function. Python's plan also
uploads offsets of pages, which this crate does when a page table is updated; so there is
a column with that. The page numbers are on the device already in Python, and uploaded here.
*The same batch again* is what a workspace remembers, on tensor cores; all other plans are
of another batch than the last.
*While the GPU works* is a plan whose stream still has the step before to do: it does not
wait for it. The last column is a page table and a plan, of the host's time for a step in
which {LAYERS} layers run by that plan.

{plans(result)}
{images["plan.svg"]}
[docs/attention.md](../attention.md#planning-a-step) says what can be reused, and what can
be planned ahead.

## On the GPU

Times are of replays of a CUDA graph that holds a run several times, in turn with a graph
that PyTorch captured of the same run on equal numbers. *MiB moved* is what the operation
has to read and write once. Replays find up to twice what the L2 cache holds partly there, so
that their share of the memory's bandwidth says nothing. A copy reads and writes, and need
not be as fast as kernels that mostly read.

{gpu(result)}
{images["bandwidth.svg"]}{left_out}"""


def main():
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    result = json.loads(pathlib.Path(sys.argv[1]).read_text())
    default = pathlib.Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
    folder = pathlib.Path(sys.argv[2]) if len(sys.argv) == 3 else default
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots(result)
    for name, text in drawn.items():
        if text:
            (folder / name).write_text(text)
    text = re.sub(r"\n{3,}", "\n\n", document(result, drawn)).rstrip() + "\n"
    (folder / "README.md").write_text(text)
    print(f"written: {folder}/README.md and {sum(map(bool, drawn.values()))} plots")


if __name__ == "__main__":
    main()
