-- The bus's own rows: what is to be published, what has been acted on, what nobody could take.

CREATE TABLE bus.outbox (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id text NOT NULL UNIQUE,
    subject text NOT NULL,
    stream text NOT NULL,
    data bytea NOT NULL,                  -- the serialised envelope
    created timestamptz NOT NULL DEFAULT now(),
    sent timestamptz,                     -- when JetStream acknowledged it; NULL: to be published
    stream_sequence bigint,               -- where it lies in the stream
    generation integer NOT NULL DEFAULT 0 -- how often its stream was filled again
);
CREATE INDEX outbox_pending ON bus.outbox (position) WHERE sent IS NULL;
CREATE INDEX outbox_sent ON bus.outbox (sent) WHERE sent IS NOT NULL;
CREATE INDEX outbox_place ON bus.outbox (stream, stream_sequence) WHERE sent IS NOT NULL;

-- The incarnation of each stream the outbox published into; another one means that it was wiped.
CREATE TABLE bus.streams (
    name text PRIMARY KEY,
    created timestamptz NOT NULL
);

CREATE TABLE bus.inbox (
    consumer text NOT NULL,
    event_id text NOT NULL,
    received timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, event_id)
);
CREATE INDEX inbox_received ON bus.inbox (received);

CREATE TABLE bus.dead_letters (
    dead_letter_id text PRIMARY KEY,      -- digest of consumer, subject and data: one message dies once per consumer
    position bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    consumer text NOT NULL,
    subject text NOT NULL,
    reason text NOT NULL,
    deliveries integer NOT NULL,
    data bytea NOT NULL,
    truncated boolean NOT NULL,           -- only the beginning of the message was kept
    created timestamptz NOT NULL DEFAULT now(),
    replayed timestamptz
);
