"""Migrations run once, in order, whoever runs them, and may not be rewritten afterwards."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from esper_core.errors import Conflict, InvalidInput, Unavailable
from esper_core.store import postgres
from esper_core.store.postgres import migrate, open_pool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0001_things.sql").write_text("CREATE TABLE things (id int); INSERT INTO things VALUES (1);")
    (tmp_path / "0002_more.sql").write_text("INSERT INTO shop.things VALUES (2);")
    return tmp_path


async def things(dsn: str) -> list[int]:
    connection = await asyncpg.connect(dsn)
    try:
        return [row["id"] for row in await connection.fetch("SELECT id FROM shop.things ORDER BY id")]
    finally:
        await connection.close()


async def test_every_file_runs_once_and_in_its_schema(database: str, folder: Path) -> None:
    ran = await migrate(database, {"shop": folder})
    assert [(migration.schema, migration.number) for migration in ran] == [("shop", 1), ("shop", 2)]
    assert await migrate(database, {"shop": folder}) == []
    (folder / "0003_last.sql").write_text("INSERT INTO things VALUES (3)")
    assert [migration.name for migration in await migrate(database, {"shop": folder})] == ["0003_last.sql"]
    assert await things(database) == [1, 2, 3]


async def test_many_processes_may_migrate_at_once(database: str, folder: Path) -> None:
    ran = await asyncio.gather(*(migrate(database, {"shop": folder}) for _ in range(5)))
    assert sorted(len(done) for done in ran) == [0, 0, 0, 0, 2]
    assert await things(database) == [1, 2]


@pytest.mark.parametrize("damage", ["edited", "gone"])
async def test_a_file_that_ran_may_not_change(database: str, folder: Path, damage: str) -> None:
    await migrate(database, {"shop": folder})
    if damage == "edited":
        with (folder / "0002_more.sql").open("a") as file:
            file.write("\n-- a small improvement")
    else:
        (folder / "0002_more.sql").unlink()
    with pytest.raises(Conflict, match=r"0002_more\.sql was") as caught:
        await migrate(database, {"shop": folder})
    assert "higher-numbered" in caught.value.hint
    assert await things(database) == [1, 2]


async def test_a_file_that_fails_leaves_nothing_and_those_before_it_stay(database: str, folder: Path) -> None:
    bad = folder / "0003_bad.sql"
    bad.write_text("INSERT INTO things VALUES (3); SELECT nonsense;")
    with pytest.raises(InvalidInput, match=r'0003_bad\.sql: column "nonsense"'):
        await migrate(database, {"shop": folder})
    assert await things(database) == [1, 2]
    bad.write_text("INSERT INTO things VALUES (3);")
    await migrate(database, {"shop": folder})
    assert await things(database) == [1, 2, 3]


@pytest.mark.parametrize("name", ["0004_gap.sql", "0002_twice.sql", "3_short.sql", "0003-dash.sql"])
def test_misnumbered_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("SELECT 1")
    with pytest.raises(InvalidInput):
        postgres.read_migrations("shop", folder)


def test_a_schema_name_is_a_name(folder: Path) -> None:
    with pytest.raises(InvalidInput):
        postgres.read_migrations('shop"; DROP SCHEMA public; --', folder)


async def test_a_pool_outlives_broken_connections(database: str) -> None:
    pool = await open_pool(database, size=2)
    try:
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        other = await asyncpg.connect(database)
        await other.execute("SELECT pg_terminate_backend($1)", pid)
        await other.close()
        await asyncio.sleep(0.1)
        assert await pool.fetchval("SELECT pg_backend_pid()") != pid
    finally:
        await pool.close()


async def test_no_server_and_wrong_names_say_so(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "PATIENCE", 0.3)
    with pytest.raises(Unavailable, match=r"PostgreSQL at 127\.0\.0\.1 does not answer") as caught:
        await open_pool("postgresql://esper:topsecret@127.0.0.1:1/esper")
    assert "topsecret" not in str(caught.value) + caught.value.hint
    with pytest.raises(InvalidInput, match='database "nowhere" does not exist'):
        await open_pool(re.sub(r"/test_\w+", "/nowhere", database))
