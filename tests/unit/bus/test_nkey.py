"""NATS's own text form of keys, and what is refused."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from esper_core.bus.login import Login
from esper_core.bus.nkey import Nkey, new_seed
from esper_core.errors import Corrupt

# the pair that NATS's documentation shows (docs.nats.io, "NKeys")
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PUBLIC = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"


def test_a_documented_seed_has_its_documented_public_key() -> None:
    assert Nkey.read(SEED).public == PUBLIC


def test_new_seeds_are_readable_and_differ() -> None:
    seeds = {new_seed() for _ in range(20)}
    assert len({Nkey.read(seed).public for seed in seeds}) == 20
    assert all(len(seed) == len(SEED) and seed.startswith("SU") for seed in seeds)


def test_a_signature_is_by_the_key_over_the_nonce() -> None:
    key, other = Nkey.read(SEED), Nkey.read(new_seed())
    signature = base64.b64decode(key.sign("nonce"))
    Ed25519PublicKey.from_public_bytes(base64.b32decode(PUBLIC)[1:33]).verify(signature, b"nonce")
    assert key.sign("nonce") != key.sign("another")
    assert key.sign("nonce") != other.sign("nonce")


@pytest.mark.parametrize("place", range(len(SEED)))
def test_every_altered_character_is_noticed(place: int) -> None:
    for other in "AQ7":
        if SEED[place] != other:
            with pytest.raises(Corrupt):
                Nkey.read(SEED[:place] + other + SEED[place + 1 :])


@pytest.mark.parametrize(
    "text", ["", "SU", PUBLIC, SEED[:-1], SEED + "A", SEED.lower(), f"{SEED}\n", "\N{SNOWMAN}" * 58]
)
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(Corrupt):
        Nkey.read(text)


def test_a_key_and_a_login_show_no_secret() -> None:
    key = Nkey.read(SEED)
    for shown in (repr(key), str(Login("karn", key)), repr(Login("karn", key)), str(key)):
        assert SEED not in shown
        assert PUBLIC in shown
