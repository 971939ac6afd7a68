-- What was decided, by which policy, and what came of it.

CREATE TABLE tamiyo.policies (
    version    text PRIMARY KEY,
    kind       text NOT NULL,
    parameters jsonb NOT NULL,
    created    timestamptz NOT NULL DEFAULT now()
);

-- The policy in force: one row.
CREATE TABLE tamiyo.active (
    single  boolean PRIMARY KEY DEFAULT true CHECK (single),
    version text NOT NULL REFERENCES tamiyo.policies
);

CREATE TABLE tamiyo.decisions (
    decision_id    text PRIMARY KEY,
    ordinal        bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    run_id         text NOT NULL,
    epoch          bigint NOT NULL,
    packet_sha256  text NOT NULL,
    policy_version text NOT NULL,
    actions        smallint NOT NULL,
    seconds        double precision NOT NULL,
    signal         jsonb NOT NULL,
    created        timestamptz NOT NULL DEFAULT now(),
    UNIQUE (run_id, epoch, packet_sha256)
);
CREATE INDEX decisions_by_run ON tamiyo.decisions (run_id, ordinal DESC);
CREATE INDEX decisions_with_actions ON tamiyo.decisions (ordinal DESC) WHERE actions > 0;

CREATE TABLE tamiyo.experience (
    report_id text PRIMARY KEY,
    ordinal   bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    run_id    text NOT NULL,
    report    jsonb NOT NULL,
    created   timestamptz NOT NULL DEFAULT now()
);
