-- Everything that was said on the bus, for a while; and every run's figures, for good. Facts may come twice, late or out
-- of order. A registration at epoch E voids what the same run had told before (lower sequence) about epochs >= E.

CREATE TABLE nissa.events (
    ordinal  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id text NOT NULL UNIQUE,
    subject  text NOT NULL,
    type     text NOT NULL,
    run_id   text NOT NULL,
    envelope bytea NOT NULL,
    payload  text NOT NULL,
    created  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX events_by_run ON nissa.events (run_id, ordinal DESC);
CREATE INDEX events_by_type ON nissa.events (type, ordinal DESC);
CREATE INDEX events_by_age ON nissa.events (created);

CREATE TABLE nissa.runs (
    run_id     text PRIMARY KEY,
    ordinal    bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    registered bigint NOT NULL DEFAULT 0,
    ended      bigint NOT NULL DEFAULT 0,
    end_state  smallint,
    state      smallint GENERATED ALWAYS AS (CASE WHEN ended > registered THEN end_state ELSE 1 END) STORED
);
CREATE INDEX runs_by_state ON nissa.runs (state);

CREATE TABLE nissa.registrations (
    run_id   text NOT NULL,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    PRIMARY KEY (run_id, sequence)
);

CREATE TABLE nissa.epochs (
    event_id text PRIMARY KEY,
    ordinal  bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    run_id   text NOT NULL,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    metrics  jsonb NOT NULL
);
CREATE INDEX epochs_by_sequence ON nissa.epochs (run_id, sequence);

CREATE VIEW nissa.history AS
SELECT e.*
FROM nissa.epochs e
WHERE NOT EXISTS (
    SELECT FROM nissa.registrations r
    WHERE r.run_id = e.run_id AND r.sequence > e.sequence AND r.epoch <= e.epoch
);
