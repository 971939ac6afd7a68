-- Wishes for kernels and how they are getting on. The table is the queue; events only say that there is something in it.
CREATE SCHEMA IF NOT EXISTS tezzeret;

-- state: 1 QUEUED, 2 RUNNING, 3 DONE, 4 FAILED, as in esper.tezzeret.v1.BuildState.
CREATE TABLE tezzeret.builds (
    build_id text PRIMARY KEY CHECK (build_id ~ '^build-[0-9a-f]{64}$'),
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    blueprint_id text NOT NULL,
    blueprint_name text NOT NULL DEFAULT '',
    interface jsonb NOT NULL,
    interface_id text NOT NULL,
    symbols jsonb NOT NULL DEFAULT '{}',
    pipeline text NOT NULL,
    rank integer NOT NULL DEFAULT 0,
    state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 4),
    kernel_id text,
    reason text NOT NULL DEFAULT '',
    attempts integer NOT NULL DEFAULT 0,
    seconds double precision NOT NULL DEFAULT 0,
    claimed_by text,
    lease_until timestamptz,
    not_before timestamptz NOT NULL DEFAULT now(),
    created timestamptz NOT NULL DEFAULT now(),
    updated timestamptz NOT NULL DEFAULT now(),
    CHECK ((state = 2) = (claimed_by IS NOT NULL)),
    CHECK ((state = 2) = (lease_until IS NOT NULL)),
    CHECK ((state = 3) = (kernel_id IS NOT NULL)),
    CHECK (state <> 4 OR reason <> '')
);
-- Most useful first; among equals the oldest.
CREATE INDEX builds_open ON tezzeret.builds (rank, serial) WHERE state IN (1, 2);
CREATE INDEX builds_interface ON tezzeret.builds (interface_id, serial);
