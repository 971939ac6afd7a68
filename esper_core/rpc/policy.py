"""Who may call what: the write authority of the platform in one table. What is not listed is denied.

``tolaria`` is every training process, ``operator`` the person at ``esperctl``, the others are the services themselves.
A servicer may be stricter still (Urza lets only Urabrask give a verdict, and an operator only retire).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

SERVICES = frozenset({"tamiyo", "kasmina", "urza", "tezzeret", "urabrask", "nissa", "oona", "simic", "emrakul", "karn"})
PRINCIPALS = SERVICES | {"tolaria", "operator"}

_ANYONE = PRINCIPALS


def _only(*principals: str) -> frozenset[str]:
    unknown = set(principals) - PRINCIPALS
    if unknown:
        raise ValueError(f"no such principals: {sorted(unknown)}")
    return frozenset(principals)


_TABLE: dict[str, dict[str, frozenset[str]]] = {
    "esper.urza.v1.UrzaService": {
        "UploadBlueprint": _only("karn", "operator"),
        "GetBlueprint": _ANYONE,
        "ListBlueprints": _ANYONE,
        "GetLineage": _ANYONE,
        "UploadKernel": _only("tezzeret"),
        "GetKernel": _ANYONE,
        "QueryKernels": _ANYONE,
        "StreamKernel": _ANYONE,
        "UploadNative": _only("tezzeret"),
        "StreamNative": _ANYONE,
        "ListNatives": _ANYONE,
        "UpdateKernelStatus": _only("urabrask", "operator"),
        "CollectGarbage": _only("operator"),
        "GetUpkeep": _ANYONE,
        "ImportLibrary": _only("operator"),
    },
    "esper.tezzeret.v1.TezzeretService": {
        "SubmitBuild": _only("tolaria", "tamiyo", "karn", "operator"),
        "GetBuild": _ANYONE,
        "ListBuilds": _ANYONE,
        "GetForgeStatus": _ANYONE,
    },
    "esper.urabrask.v1.UrabraskService": {
        "GetEvaluation": _ANYONE,
        "Evaluate": _only("operator", "tezzeret"),
        "Retag": _only("operator"),
    },
    "esper.tamiyo.v1.TamiyoService": {
        "Step": _only("tolaria"),
        "Analyze": _only("tolaria", "operator", "simic"),
        "GetPolicyStatus": _ANYONE,
        "LoadPolicy": _only("simic", "operator"),
        "UpdatePolicy": _only("simic", "operator"),
        "ListDecisions": _ANYONE,
        "AddExperience": _only("tolaria", "simic", "kasmina"),
    },
    "esper.kasmina.v1.KasminaService": {
        "Germinate": _only("tamiyo", "operator"),
        "GetSeed": _ANYONE,
        "ListSeeds": _ANYONE,
        "Transition": _only("tamiyo", "operator"),
        "LoadKernel": _only("tamiyo", "operator"),
        "UnloadKernel": _only("tamiyo", "operator"),
        "GetLayerStats": _ANYONE,
        "WatchSeeds": _ANYONE,
    },
    "esper.emrakul.v1.EmrakulService": {
        "PlanCarving": _only("emrakul", "operator"),
        "GetPlan": _ANYONE,
        "ListPlans": _ANYONE,
        "ApplyPlan": _only("emrakul", "operator"),
        "UndoPlan": _only("emrakul", "operator"),
        "GetSurvey": _ANYONE,
    },
    "esper.tolaria.v1.TolariaService": {
        "GetRun": _ANYONE,
        "ListRuns": _ANYONE,
        "WatchRun": _ANYONE,
    },
    "esper.nissa.v1.NissaService": {
        "ListEvents": _ANYONE,
        "WatchEvents": _ANYONE,
        "GetRunHistory": _ANYONE,
        "ListDeadLetters": _ANYONE,
    },
    "esper.karn.v1.KarnService": {
        "Propose": _only("operator"),
        "StartSearch": _only("operator"),
        "GetSearch": _ANYONE,
        "ListSearches": _ANYONE,
        "WatchSearch": _ANYONE,
        "StopSearch": _only("operator"),
        "ListInterfaces": _ANYONE,
        "GetArchive": _ANYONE,
        "ListProposals": _ANYONE,
    },
    "grpc.health.v1.Health": {
        "Check": _ANYONE,
        "List": _ANYONE,
        "Watch": _ANYONE,
    },
    "grpc.reflection.v1alpha.ServerReflection": {
        "ServerReflectionInfo": _ANYONE,
    },
}

POLICY: Mapping[str, frozenset[str]] = MappingProxyType(
    {f"/{service}/{method}": allowed for service, table in _TABLE.items() for method, allowed in table.items()}
)
"""Full method path to the principals that may call it."""
