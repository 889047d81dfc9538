"""`flashinfer serve`, as tests start it."""

import os
import pathlib
import re
import time

from program import Program, free_port, get

ROOT = pathlib.Path(__file__).resolve().parents[3]

# One line of /metrics: a name, labels, a value.
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Server(Program):
    """A server that is loading, or ready."""

    def __init__(self, program, log, *options):
        port = free_port()
        command = [program, "serve", *options, "--host", "127.0.0.1", "--port", str(port)]
        super().__init__(command, f"http://127.0.0.1:{port}", log)

    @property
    def v1(self):
        """What clients take as their base URL."""
        return self.url + "/v1"

    def ready(self, seconds=120):
        self.wait_for("/ready", seconds)
        return self

    def metric(self, name, **labels):
        """The sum of the samples of this name that have these labels."""
        status, text = get(self.url + "/metrics")
        assert status == 200, text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            float(value)
            for found, given, value in SAMPLE.findall(text)
            if found == name and all(label in given.split(",") for label in wanted)
        ]
        assert found, f"/metrics has no {name} of {labels}:\n{text}"
        return sum(found)

    def load(self):
        """Answers that run or wait."""
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")

    def wait_until_idle(self, seconds=30):
        """Waits until no answer runs or waits, and no page is in use."""
        deadline = time.monotonic() + seconds
        while True:
            load, cache = self.load(), self.metric("vllm:kv_cache_usage_perc")
            if load == 0 and cache == 0:
                return
            assert time.monotonic() < deadline, f"after {seconds} s {load} answers, {cache} of the cache in use"
            time.sleep(0.05)

    def memory(self):
        """Bytes of its memory that are resident."""
        pages = int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
