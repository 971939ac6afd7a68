"""Urza: what to serve. At its start the built-in blueprints are put on the shelf."""

from __future__ import annotations

from esper_core import log
from esper_core.pb.esper.urza.v1 import urza_pb2_grpc
from esper_core.rpc.server import ServedService
from services.runtime import Platform, Service
from services.urza.blueprints import Blueprints
from services.urza.library import Library
from services.urza.native import Natives
from services.urza.servicer import UrzaServicer

NAME = "urza"
SERVICE = "esper.urza.v1.UrzaService"
TRUST_FILE = "trust.json"


async def build(platform: Platform) -> Service:
    """The library over the schema ``urza`` and the platform's blobs."""
    blueprints = Blueprints(platform.database)
    library = Library(platform.database, platform.blobs, platform.endpoints.keys_dir / TRUST_FILE)
    natives = Natives(platform.database, platform.blobs, platform.endpoints.keys_dir / TRUST_FILE)
    log.get(NAME).info("urza.seeded", new=await blueprints.seed())
    register = urza_pb2_grpc.add_UrzaServiceServicer_to_server
    return Service(NAME, (ServedService(SERVICE, register, UrzaServicer(blueprints, library, natives)),))
