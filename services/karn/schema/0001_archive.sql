-- What Karn has met, invented and learnt. Archive and surrogate are derived from these rows whenever they are needed.
CREATE SCHEMA IF NOT EXISTS karn;

CREATE TABLE karn.interfaces (
    interface_id text PRIMARY KEY,
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    interface jsonb NOT NULL,
    run_id text NOT NULL DEFAULT '',
    -- of the exercises; never falls
    level smallint NOT NULL DEFAULT 1 CHECK (level BETWEEN 1 AND 3)
);

-- state: 1 RUNNING, 2 FINISHED, 3 STOPPED, as in esper.karn.v1.SearchState.
CREATE TABLE karn.searches (
    search_id text PRIMARY KEY,
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    interface_ids text[] NOT NULL,
    generations integer NOT NULL CHECK (generations > 0),
    population integer NOT NULL CHECK (population > 0),
    seed bigint NOT NULL,
    generation integer NOT NULL DEFAULT 0,
    state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 3),
    created timestamptz NOT NULL DEFAULT now()
);

-- One row per generation and interface as soon as it is bred; the figures when it is over.
CREATE TABLE karn.generations (
    search_id text NOT NULL REFERENCES karn.searches,
    generation integer NOT NULL,
    interface_id text NOT NULL REFERENCES karn.interfaces,
    level smallint,
    best double precision,
    coverage double precision,
    score double precision,
    measured integer,
    PRIMARY KEY (search_id, generation, interface_id)
);

-- state: 1 PROPOSED, 2 BUILDING, 3 MEASURED, 4 FAILED, 5 REJECTED, as in esper.karn.v1.ProposalState.
-- form: what the design computes, whatever it is called; one row per form and interface, so that nothing is tried twice.
-- blueprint_id, symbols: as the forge is asked for it; ir has these values as defaults.
CREATE TABLE karn.designs (
    interface_id text NOT NULL REFERENCES karn.interfaces,
    form text NOT NULL,
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    ir jsonb NOT NULL,
    blueprint_id text NOT NULL,
    symbols jsonb NOT NULL DEFAULT '{}',
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 5),
    search_id text NOT NULL DEFAULT '',
    generation integer NOT NULL DEFAULT 0,
    operator text NOT NULL,
    why text NOT NULL DEFAULT '',
    expected jsonb,
    units double precision NOT NULL,
    build_id text,
    kernel_id text,
    lessons jsonb NOT NULL DEFAULT '[]',
    forward_seconds double precision,
    reason text NOT NULL DEFAULT '',
    created timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (interface_id, form)
);
CREATE INDEX designs_open ON karn.designs (state, serial) WHERE state IN (1, 2);
CREATE INDEX designs_search ON karn.designs (search_id, generation);
CREATE INDEX designs_kernel ON karn.designs (kernel_id);

-- What became of kernels in runs.
CREATE TABLE karn.reports (
    report_id text PRIMARY KEY,
    kernel_id text NOT NULL,
    kept boolean NOT NULL,
    rolled_back boolean NOT NULL
);
CREATE INDEX reports_kernel ON karn.reports (kernel_id);
