"""Works that misbehave, run by ``test_warm_child`` in a real child."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time

from esper_core.errors import InvalidInput
from services.sandbox import Job, peak_memory, serve


def echo(job: Job) -> Job:
    print("noise between the answers")
    return {"said": job["say"], "pid": os.getpid(), "nice": os.nice(0), "environment": sorted(os.environ)}


def look(job: Job) -> Job:
    """Everything that is in the environment."""
    return {"environment": dict(os.environ)}


def dial(job: Job) -> Job:
    """What becomes of every attempt to reach somebody: by Python's module, by libc, by a process of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    outcomes = {"libc": errno.errorcode[ctypes.get_errno()] if libc.socket(2, 1, 0) < 0 else "open"}
    outcomes["unix"] = errno.errorcode[ctypes.get_errno()] if libc.socket(1, 1, 0) < 0 else "open"
    try:
        with socket.create_connection(("127.0.0.1", job["port"]), 1):
            outcomes["python"] = "connected"
    except PermissionError as error:
        outcomes["python"] = errno.errorcode[error.errno or 0]
    program = f"import socket; socket.create_connection(('127.0.0.1', {job['port']}), 1)"
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    outcomes["grandchild"] = "connected" if started.returncode == 0 else started.stderr.strip().splitlines()[-1]
    return outcomes


def refuse(job: Job) -> Job:
    raise InvalidInput("no", hint="ask for less")


def hang(job: Job) -> Job:
    time.sleep(60)
    return {}


def spin(job: Job) -> Job:
    while True:
        pass


def compute(job: Job) -> Job:
    """Work that takes so many processor seconds."""
    began = time.process_time()
    while time.process_time() < began + job["seconds"]:
        pass
    return {"used": time.process_time() - began}


def hoard(job: Job) -> Job:
    with peak_memory() as peak:
        held = bytearray(job["bytes"])
        held[::4096] = b"x" * len(held[::4096])
    return {"peak": peak[0]}


def die(job: Job) -> Job:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def break_down(job: Job) -> Job:
    return {"never": job["missing"]}


def babble(job: Job) -> Job:
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os._exit(3)


if __name__ == "__main__":
    works = (echo, compute, look, dial, refuse, hang, spin, hoard, die, break_down, babble)
    serve({work.__name__: work for work in works})
