"""The edge of a process that a person started: what escapes becomes words on standard error and an exit code."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from rich.console import Console

from esper_core import log
from esper_core.errors import EsperError
from esper_core.ids import new_id


def writing(work: Callable[[], int]) -> int:
    """The exit code of a command that writes all or nothing, with only its warnings logged."""
    console = Console(stderr=True)
    log.configure("tolaria", json=not console.is_terminal, level="warning")
    return answered(console, work, interrupted="stopped; nothing was written")


def answered(console: Console, work: Callable[[], int], interrupted: str) -> int:
    """The exit code of ``work``, or of what went wrong in it.

    Args:
        console: standard error.
        work: gives its own exit code.
        interrupted: what to say after Ctrl-C.
    """
    try:
        return work()
    except EsperError as error:
        console.print(f"error: {error.message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            console.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        console.print(interrupted, markup=False, highlight=False)
        return 130
    except Exception:  # noqa: BLE001 - the process's edge: a defect becomes an incident id for the person, a trace for the log
        incident = new_id()
        log.get("tolaria").error("incident", incident=incident, trace=traceback.format_exc())
        console.print(f"error: a defect in Esper, incident {incident}; the log above has its trace", style="bold red")
        return 70
