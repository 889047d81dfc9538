"""What the benchmark `kernels` measured with two versions of FlashInfer, side by side.

    FLASHINFER_RS_WHEELS=… cargo bench --bench kernels -- --json FIRST.json
    FLASHINFER_RS_WHEELS=… cargo bench --bench kernels -- --json SECOND.json
    python3 benches/versions.py FIRST.json SECOND.json

writes a table to the standard output: this crate's time to enqueue and to plan, and the
GPU's, in microseconds, and how much the second takes of the first. The two runs are of one
machine, one after the other: differences of a few percent say nothing.
"""

import json
import pathlib
import sys

from report import cell, ratio, table


def times(case):
    """Microseconds to enqueue, to plan, and on the GPU."""
    return [part and part.get("rust_us") for part in (case["run"], case["plan"], case["gpu"])]


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    first, second = (json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:])
    machines = [result["machine"]["gpu"] for result in (first, second)]
    if machines[0] != machines[1]:
        raise SystemExit(f"the results are of different GPUs: {machines[0]} and {machines[1]}")
    names = [result["versions"]["modules"].removeprefix("FlashInfer ") for result in (first, second)]
    header = ["case"]
    for what in ("enqueue", "plan", "GPU"):
        header += [f"{what} {names[0]}", names[1], "ratio"]
    others = {case["name"]: case for case in second["cases"]}
    rows = []
    for case in first["cases"]:
        if case["name"] not in others:
            continue
        row = [case["name"]]
        for before, after in zip(times(case), times(others[case["name"]])):
            row += [cell(before), cell(after), cell(ratio(after, before))]
        rows.append(row)
    print(table(header, rows))
    left_out = {case["name"] for case in first["cases"]} ^ others.keys()
    if left_out:
        print(f"\nIn one of the results only: {', '.join(sorted(left_out))}.")


if __name__ == "__main__":
    main()
