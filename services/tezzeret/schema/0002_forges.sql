-- A build is for one kind of machine and one toolchain; rows from before either was noted (both empty) are anybody's.
ALTER TABLE tezzeret.builds
    ADD COLUMN target text NOT NULL DEFAULT '',
    ADD COLUMN toolchain text NOT NULL DEFAULT '',
    -- Why it was refused, as in esper.tezzeret.v1.Refusal; 0 where it was not.
    ADD COLUMN refusal smallint NOT NULL DEFAULT 0,
    -- What static analysis says of it; 0 until it was analysed.
    ADD COLUMN parameters bigint NOT NULL DEFAULT 0,
    ADD COLUMN flops bigint NOT NULL DEFAULT 0,
    ADD COLUMN memory_bytes bigint NOT NULL DEFAULT 0,
    -- Attempts that failed in themselves, as against those whose forge died or whose library was away.
    ADD COLUMN failures integer NOT NULL DEFAULT 0,
    -- When the present or last claim began.
    ADD COLUMN begun timestamptz,
    -- Seconds of a native step over seconds of an eager one; NULL where none was compiled. Shipped only where it won.
    ADD COLUMN native_ratio double precision,
    ADD COLUMN native_shipped boolean NOT NULL DEFAULT false,
    -- Why the pipeline stopped short of what was asked, though the kernel is whole.
    ADD COLUMN note text NOT NULL DEFAULT '';

-- Who forges, and when each was last heard of.
CREATE TABLE tezzeret.forges (
    forge text PRIMARY KEY,
    host text NOT NULL,
    pid integer NOT NULL,
    target text NOT NULL,
    toolchain text NOT NULL,
    started timestamptz NOT NULL DEFAULT now(),
    seen timestamptz NOT NULL DEFAULT now(),
    done bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0
);
