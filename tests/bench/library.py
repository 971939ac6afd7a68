"""Finding kernels among a million: what each shape of question takes, by which index, and that the answer is right."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import services.urza
from esper_core.blueprint.catalogue import catalogue
from esper_core.bus.database import Pool
from esper_core.config import Endpoints, PlatformConfig
from esper_core.kernel.manifest import KernelManifest, Provenance
from esper_core.store.postgres import migrate, open_pool
from services.urza.blueprints import Blueprints
from services.urza.library import Library
from services.urza.query import PLANNING, Order, Query, classes
from services.urza.records import KERNEL
from tests.bench.bench import Pace, Table
from tests.bench.figures import Row, Sample
from tests.bench.ground import folder, running
from tests.service.innovation.papers import interface

KERNELS, QUICK_KERNELS = 1_000_000, 20_000
INTERFACES, DESIGNS, FAMILIES = 2000, 400, 200
WORDS = ("low", "medium", "high")
TARGETS = ("x86-avx2", "x86-avx512", "arm-neon")
BATCH = 20_000
PAGE = 50
COLUMNS = (
    "kernel_id", "blueprint_id", "interface_id", "manifest", "blob_sha256", "blob_bytes", "parameters", "status", "tags",
    "measurement", "forward_seconds", "created_by", "born_of", "interest",
)  # fmt: skip


@dataclass(eq=False)
class Population:
    """A million kernels as arrays, one element each: what a brute-force search looks through."""

    ids: list[str]
    interface: np.ndarray[Any, Any]
    design: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    parameters: np.ndarray[Any, Any]
    forward: np.ndarray[Any, Any]
    memory: np.ndarray[Any, Any]
    target: np.ndarray[Any, Any]
    interest: np.ndarray[Any, Any]
    traits: dict[str, np.ndarray[Any, Any]]
    """What the tags say: size and latency in thirds, family, and whether it is rare."""
    designs: list[str]
    origins: list[str]

    @classmethod
    def invent(cls, count: int, designs: list[str], origins: list[str]) -> Population:
        """Few interfaces have many kernels, most kernels are fit, few were ever used, one tag is rare."""
        chance = np.random.default_rng(8)
        sizes, speeds = chance.integers(0, 3, count), chance.integers(0, 3, count)
        families, rare = chance.integers(0, FAMILIES, count), chance.random(count) < 20 / count
        used = chance.random(count) < 0.05
        return cls(
            ids=[
                f"kernel-{value.hex()}"
                for value in np.frombuffer(chance.bytes(32 * count), dtype="V32")[:count].tolist()
            ],
            interface=np.minimum(chance.zipf(1.3, count) - 1, INTERFACES - 1),
            design=chance.integers(0, len(designs), count),
            status=chance.choice([1, 2, 3, 4], count, p=[0.1, 0.7, 0.15, 0.05]),
            parameters=chance.lognormal(7, 2, count).astype(np.int64) + 1,
            forward=chance.lognormal(math.log(2e-4), 1, count),
            memory=chance.lognormal(math.log(1e6), 1, count).astype(np.int64),
            target=chance.integers(0, len(TARGETS), count),
            interest=np.where(used, chance.normal(0, 3, count), -np.inf),
            traits={"size": sizes, "latency": speeds, "family": families, "rare": rare.astype(np.int64)},
            designs=designs,
            origins=origins,
        )

    def tags(self, i: int) -> list[str]:
        """Of one kernel."""
        said = [f"{name}:{WORDS[self.traits[name][i]]}" for name in ("size", "latency")]
        rare = ["rare"] if self.traits["rare"][i] else []
        return ["layout:features", *said, f"family:{self.traits['family'][i]}", *rare]

    def tagged(self, tag: str) -> np.ndarray[Any, Any]:
        """Who has ``tag``."""
        name, _, value = tag.partition(":")
        if name == "layout":
            return np.ones(len(self.ids), dtype=bool)
        wanted = 1 if name == "rare" else int(value) if name == "family" else WORDS.index(value)
        found: np.ndarray[Any, Any] = self.traits[name] == wanted
        return found

    def rows(self, manifest: str, mould: KernelManifest) -> Iterator[tuple[Any, ...]]:
        """As they are copied into the table; the manifests are real ones under other names."""
        for i, kernel_id in enumerate(self.ids):
            status, forward = int(self.status[i]), float(self.forward[i])
            measurement = None
            if status != 1:
                measurement = json.dumps(
                    {
                        "batch": 64, "forward_seconds": forward, "forward_seconds_p99": 1.5 * forward,
                        "backward_seconds": 2 * forward, "peak_memory_bytes": int(self.memory[i]),
                        "precision_drift": 0.0, "gradient_norm": 1.0, "deterministic": True, "repetitions": 30,
                        "target": TARGETS[self.target[i]],
                    }
                )  # fmt: skip
            design = self.design[i]
            yield (
                kernel_id, self.designs[design], f"interface-{self.interface[i]}", manifest, kernel_id[7:],
                mould.blob_bytes, int(self.parameters[i]), status, self.tags(i), measurement,
                None if measurement is None else forward, "tezzeret", self.origins[design], float(self.interest[i]),
            )  # fmt: skip

    def search(self, query: Query) -> list[str]:
        """The first page by brute force."""
        measured = self.status != 1
        fit = np.ones(len(self.ids), dtype=bool)
        if query.interface_id:
            fit &= self.interface == int(query.interface_id.removeprefix("interface-"))
        if query.status:
            fit &= self.status == query.status
        if query.max_forward_seconds:
            fit &= measured & (self.forward <= query.max_forward_seconds)
        if query.max_memory_bytes:
            fit &= measured & (self.memory <= query.max_memory_bytes)
        if query.max_parameters:
            fit &= self.parameters <= query.max_parameters
        if query.target:
            fit &= measured & (self.target == TARGETS.index(query.target))
        if query.blueprint_id:
            fit &= self.design == self.designs.index(query.blueprint_id)
        if query.born_of:
            fit &= np.array([origin == query.born_of for origin in self.origins])[self.design]
        for tag in query.required_tags:
            fit &= self.tagged(tag)
        for tag in query.excluded_tags:
            fit &= ~self.tagged(tag)
        found = np.flatnonzero(fit)
        speed = np.where(measured, self.forward, np.inf)
        values = {Order.PARAMETERS: self.parameters, Order.FORWARD: speed, Order.INTEREST: -self.interest}
        value = values.get(query.order, -np.arange(len(self.ids)))
        down = query.order in (Order.INTEREST, Order.NEWEST)
        names = -self.by_name if down else self.by_name
        lacks = [~self.tagged(tag)[found] for tag in reversed(query.preferred_tags)]
        ranked = found[np.lexsort((names[found], value[found], *lacks))]
        return [self.ids[i] for i in ranked[: query.size]]

    @functools.cached_property
    def by_name(self) -> np.ndarray[Any, Any]:
        """Place of every kernel among the ids."""
        places = np.empty(len(self.ids), dtype=np.int64)
        places[np.argsort(np.array(self.ids))] = np.arange(len(self.ids))
        return places


def shapes(number: int, population: Population) -> dict[str, Query]:
    """One question of every shape; ``number`` varies what is asked."""
    chance = np.random.default_rng(number)
    common, any_interface = (f"interface-{chance.integers(0, most)}" for most in (5, INTERFACES))
    family, design = f"family:{chance.integers(0, FAMILIES)}", population.designs[chance.integers(0, DESIGNS)]
    fit = Query(status=2, size=PAGE)
    return {
        "a slot's interface, validated": replace(fit, interface_id=any_interface),
        "a crowded interface, validated": replace(fit, interface_id=common),
        "crowded, two tags, one excluded": replace(
            fit, interface_id=common, required_tags=["layout:features", "size:low"], excluded_tags=["latency:high"]
        ),
        "crowded, two preferred tags": replace(fit, interface_id=common, preferred_tags=["latency:low", family]),
        "validated, a common tag": replace(fit, required_tags=["size:high"]),
        "validated, one tag of 200": replace(fit, required_tags=[family]),
        "a rare tag": Query(required_tags=["rare"], size=PAGE),
        "a rare tag preferred": replace(fit, preferred_tags=["rare"]),
        "tight limits on latency and memory": replace(
            fit, max_forward_seconds=float(chance.uniform(1e-5, 2e-5)), max_memory_bytes=200_000
        ),
        "fastest on one machine kind": replace(fit, order=Order.FORWARD, target=TARGETS[number % 3]),
        "fastest for a crowded interface": replace(fit, order=Order.FORWARD, interface_id=common),
        "most interesting": replace(fit, order=Order.INTEREST),
        "most interesting for an interface": replace(fit, order=Order.INTEREST, interface_id=common),
        "newest born of karn": replace(fit, order=Order.NEWEST, born_of="karn"),
        "of one blueprint": replace(fit, blueprint_id=design),
        "all, cheapest": Query(size=PAGE),
    }


def run(pace: Pace) -> list[Table]:
    with folder("library") as path, running(PlatformConfig(data_dir=path, services_command=())) as endpoints:
        return pace.ground.run(_measured(endpoints, pace))


async def _measured(endpoints: Endpoints, pace: Pace) -> list[Table]:
    dsn = endpoints.postgres_dsn.get_secret_value()
    await migrate(dsn, {"urza": Path(services.urza.__path__[0]) / "schema"})
    pool = await open_pool(dsn, size=2)
    try:
        count = pace.rounds(KERNELS, QUICK_KERNELS)
        pace.say(f"{count:,} kernels into the table")
        population, loaded = await _filled(pool, count)
        size = await pool.fetchval("SELECT pg_size_pretty(pg_total_relation_size('urza.kernels'))")
        pace.say("every shape of question")
        rounds = pace.rounds(100, 5)
        asked: dict[str, list[float]] = {}
        for number in range(rounds):
            for name, query in shapes(number, population).items():
                asked.setdefault(name, []).append(await _ask(pool, query))
        pace.say("answers against a brute-force search")
        checked = await _checked(pool, population, pace.rounds(3, 1))
        plans = [{"what": name, "plan": await _plan(pool, query)} for name, query in shapes(0, population).items()]
        pace.say("whole pages, and one after the other")
        whole = await _whole(pool, population, rounds)
    finally:
        await pool.close()
    return [
        Table(
            f"A page of {PAGE} kernels among {count:,}, in the database",
            [Sample(tuple(seconds)).row(name, "ms", 1e3) for name, seconds in asked.items()],
            (
                f"Loaded by COPY and indexed in {loaded:.0f} s; {size} with indexes. Statement and rows over the "
                "unix socket, planning included, other values every time, all shapes in turn. "
                f"{checked} of the answers were compared with a brute-force search of the same population: all equal.",
            ),
        ),
        Table("How PostgreSQL finds them", plans, ("From EXPLAIN; of preferred tags the first class.",)),
        Table(f"Library.query as the server runs it, {PAGE} kernels read and checked", whole),
    ]


async def _filled(pool: Pool, count: int) -> tuple[Population, float]:
    ir = catalogue()["bottleneck_mlp"]
    origins = ["karn" if number % 10 else "catalogue" for number in range(DESIGNS)]
    designs = [ir.model_copy(update={"name": f"design-{number}"}) for number in range(DESIGNS)]
    for design, origin in zip(designs, origins, strict=True):
        await Blueprints(pool).put(design, origin)
    mould = KernelManifest.describe(ir, interface(), b"weights", Provenance(compiler="bench", target="cpu"))
    population = await asyncio.to_thread(Population.invent, count, [design.id for design in designs], origins)
    rows = population.rows(mould.model_dump_json(), mould)
    began = time.perf_counter()
    async with pool.acquire() as connection:
        indexes = await connection.fetch(
            """SELECT i.indexrelid::regclass::text AS name, pg_get_indexdef(i.indexrelid) AS made FROM pg_index i
               WHERE i.indrelid = 'urza.kernels'::regclass
               AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid)"""
        )
        for index in indexes:
            await connection.execute(f"DROP INDEX {index['name']}")
        await connection.execute("SET session_replication_role = replica")  # the triggers have nothing to say here
        for _ in range(0, count, BATCH):
            batch = list(itertools.islice(rows, BATCH))
            await connection.copy_records_to_table("kernels", schema_name="urza", columns=COLUMNS, records=batch)
        await connection.execute("RESET session_replication_role")
        for index in indexes:
            await connection.execute(index["made"], timeout=600)
    loaded = time.perf_counter() - began
    await pool.execute("VACUUM ANALYZE urza.kernels", timeout=600)
    return population, loaded


async def _ask(pool: Pool, query: Query) -> float:
    """Seconds in the database, as ``Library.query`` asks."""
    began = time.perf_counter()
    await _answer(pool, query)
    return time.perf_counter() - began


async def _answer(pool: Pool, query: Query) -> list[str]:
    found: list[str] = []
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        await connection.execute(PLANNING)
        for _, asked in classes(query):
            rows = await connection.fetch(f"{KERNEL} {asked.sql}", *asked.arguments)
            found += [row["kernel_id"] for row in rows]
            if len(found) > query.size:
                break
    return found[: query.size]


async def _checked(pool: Pool, population: Population, rounds: int) -> int:
    """How many answers were compared; every shape ``rounds`` times."""
    done = 0
    for number in range(rounds):
        for name, query in shapes(number, population).items():
            expected = await asyncio.to_thread(population.search, query)
            if await _answer(pool, query) != expected:
                raise RuntimeError(f"the answer to {name!r} ({query}) is not what a brute-force search finds")
            done += 1
    return done


async def _plan(pool: Pool, query: Query) -> str:
    _, asked = next(classes(query))
    async with pool.acquire() as connection, connection.transaction(readonly=True):
        await connection.execute(PLANNING)
        text = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {KERNEL} {asked.sql}", *asked.arguments)
    steps: list[str] = []

    def walk(node: dict[str, Any]) -> None:
        if node.get("Parent Relationship") == "SubPlan" or node.get("Relation Name") in (
            "usage",
            "attestations",
            "deeds",
        ):
            return
        name = node["Node Type"]
        if "Index Name" in node:
            steps.append(f"{name} {node['Index Name']}")
        elif name not in ("Limit", "Nested Loop", "Result", "Memoize"):
            steps.append(name)
        for child in node.get("Plans", ()):
            walk(child)

    walk(json.loads(text)[0]["Plan"])
    return " ← ".join(step for step in steps if "usage_pkey" not in step)


async def _whole(pool: Pool, population: Population, rounds: int) -> list[Row]:
    library = Library(pool, None, Path("unused"))  # type: ignore[arg-type]  # searching reads no blob
    query = Query(status=2, interface_id="interface-0", size=PAGE)
    first, deep = [], []
    token = ""
    for _ in range(rounds):
        for times, asked in ((first, query), (deep, replace(query, token=token))):
            began = time.perf_counter()
            found, more = await library.query(asked)
            times.append(time.perf_counter() - began)
        token = found[-1].token if more else ""
    prefix = []
    for kernel_id in population.ids[:rounds]:
        began = time.perf_counter()
        await library.get(kernel_id[:20])
        prefix.append(time.perf_counter() - began)
    return [
        Sample(tuple(first)).row("the first page", "ms", 1e3),
        Sample(tuple(deep)).row(f"the next page, {rounds} pages on", "ms", 1e3),
        Sample(tuple(prefix)).row("one kernel by 13 digits of its id", "ms", 1e3),
    ]
