"""Oona's library: commands and facts on JetStream, with an effect that happens once.

subjects   the streams and subjects, declared once
policy     who may publish, read and administer what: the server's permissions, from one table
nkey       NATS's key pairs; login: as whom to connect
envelope   the outside of every event: wrap, unwrap, checks
bus        the connection: publish with an id, provision
outbox     record an event in the transaction that makes it true; the relay publishes it
rebuild    publish again what a wiped or damaged stream has lost
inbox      consume: one transaction per event; consume_plain and watch without a database
dead       messages that no consumer could take
spool      a training process's outbox: a local append-only file
"""

from pathlib import Path

SCHEMA = Path(__file__).parent / "schema"
"""Migrations of the ``bus`` schema: outbox, inbox, dead letters."""
