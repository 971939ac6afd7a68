-- Seeds as their runs tell of them, and the orders given to them. Facts may come twice, late or out of order; every
-- statement of the projection gives the same rows for any order of arrival. A registration at epoch E voids what the
-- same run had told before (lower sequence) about epochs >= E: it went back to a checkpoint.

CREATE SEQUENCE kasmina.news;

CREATE TABLE kasmina.runs (
    run_id     text PRIMARY KEY,
    ordinal    bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    registered bigint NOT NULL DEFAULT 0,
    ended      bigint NOT NULL DEFAULT 0,
    end_state  smallint,
    state      smallint GENERATED ALWAYS AS (CASE WHEN ended > registered THEN end_state ELSE 1 END) STORED
);

CREATE TABLE kasmina.registrations (
    run_id   text NOT NULL,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    PRIMARY KEY (run_id, sequence)
);

CREATE TABLE kasmina.slots (
    run_id       text NOT NULL,
    slot         text NOT NULL,
    interface_id text NOT NULL,
    PRIMARY KEY (run_id, slot)
);

CREATE TABLE kasmina.seed_events (
    event_id   text PRIMARY KEY,
    ordinal    bigint NOT NULL DEFAULT nextval('kasmina.news') UNIQUE,
    run_id     text NOT NULL,
    seed_id    text NOT NULL,
    sequence   bigint NOT NULL,
    epoch      bigint NOT NULL,
    event      jsonb NOT NULL
);
CREATE INDEX seed_events_by_seed ON kasmina.seed_events (run_id, seed_id, sequence DESC);
CREATE INDEX seed_events_by_run ON kasmina.seed_events (run_id, ordinal);

CREATE VIEW kasmina.history AS
SELECT e.*
FROM kasmina.seed_events e
WHERE NOT EXISTS (
    SELECT FROM kasmina.registrations r
    WHERE r.run_id = e.run_id AND r.sequence > e.sequence AND r.epoch <= e.epoch
);

-- Seeds that became part of their hosts' own weights: their slots are free for the next generation.
CREATE TABLE kasmina.folds (
    event_id   text PRIMARY KEY,
    run_id     text NOT NULL,
    slot       text NOT NULL,
    generation bigint NOT NULL,
    sequence   bigint NOT NULL,
    epoch      bigint NOT NULL
);
CREATE INDEX folds_by_run ON kasmina.folds (run_id);

-- The last word on every seed; derived from history, folds and slots, never written otherwise.
CREATE TABLE kasmina.seeds (
    seed_id        text PRIMARY KEY,
    run_id         text NOT NULL,
    slot           text NOT NULL,
    generation     bigint NOT NULL,
    state          smallint NOT NULL,
    kernel_id      text NOT NULL,
    blueprint_name text NOT NULL,
    alpha          double precision NOT NULL,
    epoch          bigint NOT NULL,
    sequence       bigint NOT NULL,
    changed        bigint NOT NULL DEFAULT nextval('kasmina.news'),
    UNIQUE (run_id, slot, generation)
);
CREATE INDEX seeds_by_change ON kasmina.seeds (changed DESC);

CREATE TABLE kasmina.telemetry (
    run_id   text NOT NULL,
    slot     text NOT NULL,
    epoch    bigint NOT NULL,
    sequence bigint NOT NULL,
    signal   jsonb NOT NULL,
    PRIMARY KEY (run_id, slot, epoch)
);

CREATE TABLE kasmina.commands (
    command_id text PRIMARY KEY,
    run_id     text NOT NULL,
    slot       text NOT NULL,
    target     smallint NOT NULL,
    kernel_id  text NOT NULL,
    issued_by  text NOT NULL,
    reason     text NOT NULL,
    style      smallint NOT NULL,
    created    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX commands_by_run ON kasmina.commands (run_id, created DESC);
