-- The library's collections of its own accord: one row says when the last one was, and who is at it.
CREATE TABLE urza.upkeep (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    created timestamptz NOT NULL DEFAULT now(),
    holder text,
    lease_until timestamptz,
    begun timestamptz,
    finished timestamptz,
    -- Earlier than usual: the last one failed or was broken off.
    retry timestamptz,
    -- Why the last one failed; empty when it did not.
    reason text NOT NULL DEFAULT '',
    passes bigint NOT NULL DEFAULT 0,
    -- Of the last one that was finished.
    forgotten bigint NOT NULL DEFAULT 0,
    blobs bigint NOT NULL DEFAULT 0,
    bytes bigint NOT NULL DEFAULT 0,
    kept bigint NOT NULL DEFAULT 0,
    CHECK ((holder IS NULL) = (lease_until IS NULL))
);
INSERT INTO urza.upkeep DEFAULT VALUES;
