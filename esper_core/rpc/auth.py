"""Who is calling: the principal that the caller's certificate names, and whether the policy lets it.

The handshake has already proved that the certificate was issued by our authority; here its SPIFFE URI is read. Does
not know revocation: a principal is shut out by renewing the authority.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar

from esper_core.errors import Forbidden, Unauthenticated
from esper_core.rpc.policy import PRINCIPALS

TRUST_DOMAIN = "spiffe://esper/"

_principal: ContextVar[str] = ContextVar("principal")


def principal() -> str:
    """The caller of the RPC that is being served.

    Raises:
        Unauthenticated: no RPC is being served here.
    """
    try:
        return _principal.get()
    except LookupError:
        raise Unauthenticated("no call is being served here", hint="ask inside a servicer's method") from None


def identify(context: Mapping[str, Iterable[bytes]]) -> str:
    """The principal of a connection, from gRPC's ``auth_context()``.

    Raises:
        Unauthenticated: the peer showed no certificate, or one that names no principal of ours.
    """
    names = [name.decode("utf-8", "replace") for name in context.get("peer_spiffe_id", ())]
    if len(names) != 1:
        raise Unauthenticated("the caller showed no identity", hint="dial with a certificate that esperctl up made")
    name = names[0].removeprefix(TRUST_DOMAIN)
    if not names[0].startswith(TRUST_DOMAIN) or name not in PRINCIPALS:
        raise Unauthenticated(f"{names[0][:120]!r} names no principal of this platform", hint=f"known: {_known()}")
    return name


def authorize(name: str, method: str, policy: Mapping[str, frozenset[str]]) -> None:
    """Let ``name`` pass and remember it for ``principal()``, for the rest of this call.

    Raises:
        Forbidden: the policy does not list it for ``method``.
    """
    allowed = policy.get(method, frozenset())
    if name not in allowed:
        raise Forbidden(
            f"{name} may not call {method}", hint=f"allowed: {', '.join(sorted(allowed))}" if allowed else ""
        )
    _principal.set(name)


def _known() -> str:
    return ", ".join(sorted(PRINCIPALS))
