"""No network for a child process: what it and whatever it starts may no longer do.

Two guards, each as far as it goes:

- A seccomp filter (Linux on x86-64 and aarch64) makes ``socket``, ``connect``, ``bind``, ``listen`` and ``io_uring_setup`` fail with
  EPERM for every kind of address, UNIX sockets included. The kernel holds it, also against native code, and a compiler that
  the child starts inherits it. It cannot be taken back.
- An audit hook refuses Python's ``socket`` module everywhere. Native code does not pass by it: where there is no seccomp (other
  systems, kernels without it), a child is secluded against mistakes and not against malice.

Neither keeps the child from files: it runs as the same user and may read what that user may, ``/proc/<parent>/environ`` and the
platform's keys among it, and write into files that others read. What is inherited stays open: the pipes to the parent.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct
import sys

# Classic BPF, see linux/filter.h, linux/seccomp.h and linux/audit.h.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_NUMBER, _ARCHITECTURE = 0, 4
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_FOREIGN_ABI = 0x40000000
"""System calls of x86-64's second ABI begin here; nothing that we run uses them."""
_CALLS = {
    "x86_64": (0xC000003E, {"socket": 41, "connect": 42, "bind": 49, "listen": 50, "io_uring_setup": 425}),
    "aarch64": (0xC00000B7, {"socket": 198, "bind": 200, "listen": 201, "connect": 203, "io_uring_setup": 425}),
}
"""By machine: the audit architecture and the numbers of what is refused."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def seclude() -> tuple[str, ...]:
    """Close inherited sockets but for stdin, stdout and stderr, and put up the guards; names of those that hold."""
    _close_sockets()
    sys.addaudithook(_refuse_sockets)
    return ("audit", "seccomp") if _filter() else ("audit",)


def _close_sockets() -> None:
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        number = int(name)
        try:
            if number > 2 and stat.S_ISSOCK(os.fstat(number).st_mode):
                os.close(number)
        except OSError:
            continue  # the directory's own descriptor, closed since


def _refuse_sockets(event: str, _: tuple[object, ...]) -> None:
    if event.startswith("socket."):
        raise PermissionError(errno.EPERM, f"{event}: this process has no network")


def _filter() -> bool:
    """Whether the kernel took the seccomp filter."""
    if not sys.platform.startswith("linux") or platform.machine() not in _CALLS:
        return False
    architecture, numbers = _CALLS[platform.machine()]
    calls = sorted(numbers.values())
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, len(calls) + 1, 0, _FOREIGN_ABI),
        *((_EQUAL, len(calls) - place, 0, number) for place, number in enumerate(calls)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(steps), code)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return bool(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0)
