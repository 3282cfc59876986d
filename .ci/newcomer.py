"""Start a server with a command, as a newcomer would, and upload a file to it.

Usage: newcomer.py DIRECTORY COMMAND
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import urllib.request

CONTENT = os.urandom(5 * 1024 * 1024)
READY = "You can now upload files to: "


def request(method: str, url: str, body: bytes = b"", **headers: str) -> dict[str, str]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers |= {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}
    asked = urllib.request.Request(url, body or None, headers, method=method)
    with urllib.request.urlopen(asked) as answer:
        return dict(answer.headers)


def upload(url: str) -> None:
    location = request("POST", url, Upload_Length=str(len(CONTENT)))["Location"]
    half = len(CONTENT) // 2
    request("PATCH", location, CONTENT[:half], Upload_Offset="0")
    assert request("HEAD", location)["Upload-Offset"] == str(half)
    request("PATCH", location, CONTENT[half:], Upload_Offset=str(half))
    with urllib.request.urlopen(location) as answer:
        assert hashlib.sha256(answer.read()).digest() == hashlib.sha256(CONTENT).digest()


def main(directory: str, command: str) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": directory, "LANG": "C.UTF-8"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    with subprocess.Popen(
        ["bash", "-c", f"{command}"],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                print(line, end="")
                if line.startswith(READY):
                    upload(line.removeprefix(READY).strip())
                    break
            else:
                sys.exit("The server did not start.")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    print("A file was uploaded in two parts and came back.")


if __name__ == "__main__":
    main(*sys.argv[1:])
