"""The whole platform under the bus's permissions: everybody can do their work, and nobody has more than that."""

from __future__ import annotations

from esper_core.bus.bus import Bus
from esper_core.bus.policy import READERS
from esper_core.bus.subjects import STREAMS
from tests.e2e.living import Living, until


async def test_the_table_is_what_the_platform_does(platform: Living) -> None:
    """Every declared consumer exists with the declared filters and no other; a run delivers; nothing was refused."""
    training = platform.train(
        "authority", settings={"optimization": {"epochs": 2}, "morphogenetic": {"prepare_seconds": 0}}
    )
    assert await training.ends() == 0, training.stderr
    assert training.delivered() == len(training.told()) > 2
    bus = await Bus.join(platform.endpoints, "oona", "test")
    declared = {
        name: sorted(subject.all for subject in reader.subjects if subject.stream == stream)
        for readers in READERS.values()
        for reader in readers
        for stream, name in reader.consumers
    }

    async def found() -> dict[str, list[str]]:
        infos = [info for stream in STREAMS for info in await bus.jetstream.consumers_info(stream.name)]
        return {info.name: sorted(info.config.filter_subjects or [info.config.filter_subject]) for info in infos}

    async def all_there() -> bool:
        return declared.keys() <= (await found()).keys()

    await until(all_there, 30)
    consumers = await found()
    await bus.close()
    assert {name: consumers[name] for name in declared} == declared
    others = {name for name in consumers.keys() - declared.keys() if not name.startswith("audit-")}
    assert "tolaria-authority-control" in others
    assert {name for name in others if not name.startswith("tolaria-")} == {"oona-dead"}
    assert "Violation" not in (platform.data_dir / "logs" / "nats.log").read_text()
