"""Programs that tests start, on loopback, and always end."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(url, timeout=5):
    """The status and the text of a page; status 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


class Program:
    """A program that serves HTTP, and what it wrote."""

    def __init__(self, command, url, log, env=None):
        self.command, self.url, self.log = [str(word) for word in command], url, log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, path, seconds=60, until=lambda status, text: status == 200):
        """Waits until a page is as it should be, and gives its text."""
        deadline, seen = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self} has ended with {self.process.returncode}:\n{self.output()}")
            seen = get(self.url + path)
            if until(*seen):
                return seen[1]
            time.sleep(0.05)
        raise TimeoutError(f"{self}: {path} after {seconds} s: {seen}\n{self.output()}")

    def output(self):
        return self.log.read_text(errors="replace")[-4000:]

    def kill(self):
        """Ends it at once, as a machine does that fails, with all that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def end(self, seconds=20):
        """Asks it to end, and makes it. True if it did by itself."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.kill()

    def __str__(self):
        return " ".join(self.command[:4])
