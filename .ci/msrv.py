"""Checks that no dependency needs a newer Rust than this crate states.

With --print it only prints the version that the crate states.
"""

import json
import subprocess
import sys


def version(text):
    numbers = [int(part) for part in text.split("-")[0].split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def metadata(*options):
    command = ["cargo", "metadata", "--format-version=1", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    own = metadata("--no-deps")["packages"][0]
    stated = own["rust_version"]
    if sys.argv[1:] == ["--print"]:
        print(stated)
        return 0
    host = subprocess.run(["rustc", "-vV"], check=True, stdout=subprocess.PIPE, text=True).stdout
    target = next(line.split(": ")[1] for line in host.splitlines() if line.startswith("host: "))
    resolved = metadata("--all-features", "--filter-platform", target)
    used = {node["id"] for node in resolved["resolve"]["nodes"]}
    packages = [package for package in resolved["packages"] if package["id"] in used]
    newer = [
        f"{package['name']} {package['version']} needs Rust {package['rust_version']}"
        for package in packages
        if package["rust_version"] and version(package["rust_version"]) > version(stated)
    ]
    for line in newer:
        print(line)
    unstated = sum(1 for package in packages if not package["rust_version"])
    print(
        f"{len(packages)} packages, {unstated} of them state no version; "
        f"{len(newer)} need more than Rust {stated}"
    )
    return 1 if newer else 0


if __name__ == "__main__":
    sys.exit(main())
