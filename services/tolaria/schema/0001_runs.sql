-- Runs as their training processes tell of them. Facts may come twice, late or out of order; every statement of the
-- projection gives the same rows for any order of arrival. A registration at epoch E voids what the same run had told
-- before (lower sequence) about epochs >= E: it went back to a checkpoint.

CREATE TABLE tolaria.runs (
    run_id      text PRIMARY KEY,
    ordinal     bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    registered  bigint NOT NULL DEFAULT 0,
    description jsonb,
    started     timestamptz,
    ended       bigint NOT NULL DEFAULT 0,
    end_state   smallint,
    outcome     jsonb,
    updated     timestamptz NOT NULL,
    state       smallint GENERATED ALWAYS AS (CASE WHEN ended > registered THEN end_state ELSE 1 END) STORED
);
CREATE INDEX runs_by_state ON tolaria.runs (state, ordinal DESC);

CREATE TABLE tolaria.registrations (
    run_id   text NOT NULL,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    PRIMARY KEY (run_id, sequence)
);

CREATE TABLE tolaria.epochs (
    event_id text PRIMARY KEY,
    ordinal  bigint GENERATED ALWAYS AS IDENTITY,
    run_id   text NOT NULL,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    metrics  jsonb NOT NULL
);
CREATE INDEX epochs_by_arrival ON tolaria.epochs (run_id, ordinal);
CREATE INDEX epochs_by_sequence ON tolaria.epochs (run_id, sequence DESC);

CREATE VIEW tolaria.history AS
SELECT e.*
FROM tolaria.epochs e
WHERE NOT EXISTS (
    SELECT FROM tolaria.registrations r
    WHERE r.run_id = e.run_id AND r.sequence > e.sequence AND r.epoch <= e.epoch
);
