-- Kernels to be judged and how they were judged. The table is the queue; events only say that there is something in it.
CREATE SCHEMA IF NOT EXISTS urabrask;

-- phase: 1 QUEUED, 2 STATIC, 3 SAFETY, 4 BENCHMARK, 5 DONE, as in esper.urabrask.v1.Phase; while the phase is 2 to 4
-- somebody holds a lease on it. verdict: 1 none yet, 2 VALIDATED, 3 REJECTED, 4 RETIRED, as in esper.core.v1.KernelStatus.
CREATE TABLE urabrask.evaluations (
    kernel_id text PRIMARY KEY CHECK (kernel_id ~ '^kernel-[0-9a-f]{64}$'),
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    interface_id text NOT NULL DEFAULT '',
    phase smallint NOT NULL DEFAULT 1 CHECK (phase BETWEEN 1 AND 5),
    verdict smallint NOT NULL DEFAULT 1 CHECK (verdict BETWEEN 1 AND 4),
    reason text NOT NULL DEFAULT '',
    measurement jsonb,
    tags text[] NOT NULL DEFAULT '{}',
    attempts integer NOT NULL DEFAULT 0,
    claimed_by text,
    lease_until timestamptz,
    not_before timestamptz NOT NULL DEFAULT now(),
    created timestamptz NOT NULL DEFAULT now(),
    updated timestamptz NOT NULL DEFAULT now(),
    CHECK ((phase BETWEEN 2 AND 4) = (claimed_by IS NOT NULL)),
    CHECK ((phase BETWEEN 2 AND 4) = (lease_until IS NOT NULL)),
    CHECK (phase <> 5 OR verdict <> 1)
);
CREATE INDEX evaluations_open ON urabrask.evaluations (serial) WHERE phase < 5;
-- The population that latency tiers are cut from, per machine kind.
CREATE INDEX evaluations_target ON urabrask.evaluations ((measurement ->> 'target')) WHERE measurement IS NOT NULL;
