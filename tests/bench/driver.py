"""A forge at work in the background: its parent in a process of its own, as the platform is one beside a training run."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from esper_core.blueprint.catalogue import catalogue
from esper_core.blueprint.interface import Layout, SlotInterface
from services.child import WarmChild
from services.sandbox import Limits
from services.tezzeret.assortment import assortment
from services.tezzeret.worker import PACED_NICE

FORGE = "services.tezzeret.forge"


class Driver:
    """Works when told to, rests when told to."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def work(self) -> None:
        """Build one kernel after the other from now on."""
        self._pipe.send("work")

    def rest(self) -> float:
        """Finish what was begun; builds per second from ``work`` until now, what ends after now left out."""
        self._pipe.send(time.monotonic())
        rate: float = self._pipe.recv()
        return rate


@contextlib.contextmanager
def driving(cores: Collection[int] = (), *, polite: bool = True) -> Iterator[Driver]:
    """A driver whose forge is warm, kept to ``cores`` where some are named; ended afterwards.

    ``polite``: as the platform's forge is; otherwise it has nothing but the lowest priority.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, tuple(cores), polite))
    process.start()
    theirs.close()
    driver = Driver(ours)
    try:
        driver.work()
        driver.rest()  # answers when the child has started and built
        yield driver
    finally:
        ours.close()  # it ends when nobody is there any more
        process.join()


def jobs(blob: Path) -> list[dict[str, Any]]:
    """A job per catalogue design and width that fits a 64-64-64 slot, each writing to ``blob``."""
    slot = SlotInterface(
        layout=Layout.FEATURES, in_width=64, out_width=64, hidden_width=64, activation="relu", foldable=True
    )
    designs = {ir.id: ir for ir in catalogue().values()}
    return [
        {
            "do": "forge",
            "blueprint": designs[wish.blueprint_id].model_dump(mode="json"),
            "interface": wish.interface.model_dump(mode="json"),
            "symbols": dict(wish.symbols),
            "pipeline": wish.pipeline,
            "seed": number,
            "blob": str(blob),
        }
        for number, wish in enumerate(assortment(slot))
    ]


def _main(pipe: Connection, cores: tuple[int, ...], polite: bool) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # the forge's child inherits it
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        asyncio.run(_drive(pipe, polite))


async def _drive(pipe: Connection, polite: bool) -> None:
    forge = WarmChild(
        FORGE, Limits(wall_seconds=600.0, nice=PACED_NICE if polite else 19), polite=polite
    )  # the first build imports the tracer
    orders = jobs(forge.scratch / "kernel")
    await forge.ask(orders[0])
    number = 0
    try:
        while True:
            pipe.recv()  # "work"; nothing else happens in this loop meanwhile
            began, ends = time.monotonic(), list[float]()
            while not pipe.poll():
                await forge.ask(orders[number % len(orders)])
                ends.append(time.monotonic())
                number += 1
            told = pipe.recv()  # "rest"
            pipe.send(sum(end <= told for end in ends) / (told - began))
    finally:
        await forge.close()
