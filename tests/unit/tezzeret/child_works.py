"""Works that misbehave, run by ``test_warm_child`` in a real child."""

import os
import signal
import sys
import time

from esper_core.errors import InvalidInput
from services.sandbox import Job, peak_memory, serve


def echo(job: Job) -> Job:
    print("noise between the answers")
    return {"said": job["say"], "pid": os.getpid(), "nice": os.nice(0), "environment": sorted(os.environ)}


def refuse(job: Job) -> Job:
    raise InvalidInput("no", hint="ask for less")


def hang(job: Job) -> Job:
    time.sleep(60)
    return {}


def spin(job: Job) -> Job:
    while True:
        pass


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
    works = (echo, refuse, hang, spin, hoard, die, break_down, babble)
    serve({work.__name__: work for work in works})
