"""The table that `flashinfer bench --steps` prints, as numbers."""

import re
import subprocess


def steps(flashinfer, arguments, seconds):
    """What the program says of single steps: its rows, by the number of requests, and the milliseconds in which the
    GPU reads all weights."""
    command = [flashinfer, "bench", *arguments]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds).stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if "|" in line]
    names = next(row for row in cells if "step ms" in row)
    rows = {row[0]: dict(zip(names, row)) for row in cells if row[0].isdigit()}
    weights = re.search(r"of weights takes ([\d.]+) ms", shown)
    return rows, float(weights.group(1))
