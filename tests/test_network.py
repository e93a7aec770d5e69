"""A pipeline stage and its notebook's kernel open no network connection, besides those within this machine."""

import ipaddress
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

# Python imports it at its start, in every process of a stage. It writes what Python's own sockets are asked for.
HOOK = """
import os, sys

log = open(os.environ["WATCHED"], "a", buffering=1)

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        print("address", *arguments[1] if isinstance(arguments[1], tuple) else ["local"], file=log)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print("address", arguments[0], file=log)

sys.addaudithook(watch)
print("started", *sys.orig_argv, file=log)
"""
# A datagram socket sends nothing when it connects, and a numeric address is not looked up.
CONTROL = """
import socket

try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.7", 9))
except OSError:
    pass
socket.getaddrinfo("192.0.2.8", 9, flags=socket.AI_NUMERICHOST)
"""
STRACE = shutil.which("strace")
CALLS = "trace=connect,sendto,sendmsg,sendmmsg,bind"


def is_here(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("local", "None", "localhost")
    return address.is_loopback


def hosts(command: list[str], folder) -> tuple[set[str], list[str]]:
    """What the processes of a command connected to, and the commands of those that run Python.

    strace sees the system calls of libraries in C too, such as ZeroMQ's; where it is missing, Python's own are watched.
    """
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    log, calls = folder / "log", folder / "calls"
    env = os.environ | {"PYTHONPATH": str(folder / "hook"), "WATCHED": str(log)}
    trace = [STRACE, "-f", "--seccomp-bpf", "-qq", "-e", CALLS, "-o", str(calls)] if STRACE else []
    done = subprocess.run([*trace, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = log.read_text().splitlines()
    found = {line.split()[1] for line in lines if line.startswith("address")}
    if STRACE:
        found |= set(re.findall(r'inet_(?:addr\(|pton\(AF_INET6, )"([^"]+)"', calls.read_text()))
    return found, [line for line in lines if line.startswith("started")]


@pytest.mark.slow
def test_a_connection_is_noticed(tmp_path):
    """The same watch, over a process whose child opens one."""
    (tmp_path / "control.py").write_text(CONTROL)
    start = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'control.py')!r}], check=True)"
    found, started = hosts([sys.executable, "-c", start], tmp_path)
    assert {host for host in found if not is_here(host)} == {"192.0.2.7", "192.0.2.8"}
    assert len(started) == 2


@pytest.mark.slow
def test_a_stage_and_its_kernel_open_no_connection(workspace, tmp_path_factory):
    for name in ("notebooks", "conf"):
        (workspace / name).symlink_to(ROOT / name)
    (workspace / "artifacts" / "gallery").unlink()
    found, started = hosts([sys.executable, "-m", "cim.cli", "run", "gallery"], tmp_path_factory.mktemp("watch"))
    assert any("ipykernel_launcher" in line for line in started)
    assert (workspace / "results" / "gallery" / "metrics.json").is_file()
    assert found  # Jupyter's own, on the loopback interface
    assert not {host for host in found if not is_here(host)}
