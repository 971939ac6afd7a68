-- What runs told of their units, the plans made of it, the orders given, and what came of them. Facts may come twice, late
-- or out of order. A registration at epoch E voids what the same run had told before (lower sequence) about epochs >= E: it
-- went back to a checkpoint.

CREATE TABLE emrakul.runs (
    run_id     text PRIMARY KEY,
    ordinal    bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    registered bigint NOT NULL DEFAULT 0,
    ended      bigint NOT NULL DEFAULT 0
);

CREATE TABLE emrakul.registrations (
    run_id   text NOT NULL,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    PRIMARY KEY (run_id, sequence)
);

-- The last word of each run only.
CREATE TABLE emrakul.surveys (
    run_id   text PRIMARY KEY,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    survey   jsonb NOT NULL
);

CREATE TABLE emrakul.plans (
    plan_id   text PRIMARY KEY,
    ordinal   bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    run_id    text NOT NULL,
    state     smallint NOT NULL,
    epoch     bigint NOT NULL,
    proposal  jsonb NOT NULL,
    issued_by text NOT NULL,
    reason    text NOT NULL,
    created   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX plans_by_run ON emrakul.plans (run_id, ordinal DESC);

CREATE TABLE emrakul.orders (
    order_id text PRIMARY KEY,
    ordinal  bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    plan_id  text NOT NULL REFERENCES emrakul.plans,
    act      smallint NOT NULL,
    body     jsonb NOT NULL,
    created  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX orders_by_plan ON emrakul.orders (plan_id, ordinal);

CREATE TABLE emrakul.events (
    event_id text PRIMARY KEY,
    run_id   text NOT NULL,
    plan_id  text NOT NULL,
    sequence bigint NOT NULL,
    epoch    bigint NOT NULL,
    event    jsonb NOT NULL
);
CREATE INDEX events_by_plan ON emrakul.events (plan_id, sequence);

CREATE VIEW emrakul.history AS
SELECT e.*
FROM emrakul.events e
WHERE NOT EXISTS (
    SELECT FROM emrakul.registrations r
    WHERE r.run_id = e.run_id AND r.sequence > e.sequence AND r.epoch <= e.epoch
);
