"""Urza: what to serve. At its start the built-in blueprints are put on the shelf."""

from __future__ import annotations

from functools import partial

from esper_core import log
from esper_core.bus import subjects
from esper_core.bus.inbox import consume
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.server import ServedService
from services.runtime import Platform, Service
from services.urza.blueprints import Blueprints
from services.urza.imports import Imports
from services.urza.library import Library
from services.urza.native import Natives
from services.urza.retention import Retention
from services.urza.servicer import UrzaServicer
from services.urza.upkeep import Upkeep
from services.urza.usage import Field
from services.urza.verdicts import Verdicts

NAME = "urza"
SERVICE = "esper.urza.v1.UrzaService"
TRUST_FILE = "trust.json"


async def build(platform: Platform) -> Service:
    """The library over the schema ``urza`` and the platform's blobs."""
    blueprints = Blueprints(platform.database)
    trust = platform.endpoints.keys_dir / TRUST_FILE
    library = Library(platform.database, platform.blobs, trust)
    log.get(NAME).info("urza.seeded", new=await blueprints.seed())
    register = urza_pb2_grpc.add_UrzaServiceServicer_to_server
    field = Field(platform.database)
    reports = partial(
        consume,
        platform.database,
        platform.bus,
        durable="urza-usage",
        subjects=(subjects.FIELD_REPORTS.all,),
        handler=field.handle,
        ordered=False,
    )
    natives = Natives(platform.database, platform.blobs, trust)
    wanted = platform.endpoints.upkeep
    retention = Retention(platform.database, platform.blobs)
    upkeep = Upkeep(platform.database, retention, wanted.collect_hours * 3600, wanted.keep_unused)
    servicer = UrzaServicer(
        platform.database,
        blueprints,
        library,
        Verdicts(platform.database, trust),
        retention,
        upkeep,
        field,
        Imports(platform.database, blueprints, library, natives, trust),
        natives,
    )
    tasks = (reports, upkeep.run) if wanted.collect_hours else (reports,)
    return Service(NAME, (ServedService(SERVICE, register, servicer),), tasks)
