-- Native parts: code for one machine kind and one torch, kept under its digest beside the kernel's own blob. Blobs named
-- here are live as long as the row is.
CREATE TABLE urza.natives (
    kernel_id text NOT NULL REFERENCES urza.kernels (kernel_id) ON DELETE CASCADE,
    target text NOT NULL,
    toolchain text NOT NULL,
    record jsonb NOT NULL,
    blob_sha256 text NOT NULL CHECK (blob_sha256 ~ '^[0-9a-f]{64}$'),
    payload_type text NOT NULL,
    payload bytea NOT NULL,
    key_id text NOT NULL,
    signature bytea NOT NULL,
    created timestamptz NOT NULL DEFAULT now(),
    created_by text NOT NULL,
    PRIMARY KEY (kernel_id, target, toolchain)
);
CREATE INDEX natives_blob ON urza.natives (blob_sha256);

CREATE OR REPLACE FUNCTION urza.keep_copy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state < OLD.state OR (NEW.blob_sha256, NEW.number) IS DISTINCT FROM (OLD.blob_sha256, OLD.number) THEN
        RAISE EXCEPTION 'a copy of % cannot come back', OLD.blob_sha256 USING ERRCODE = 'restrict_violation';
    END IF;
    IF OLD.state = 1 AND NEW.state > 1
        AND (EXISTS (SELECT FROM urza.kernels k WHERE k.blob_sha256 = NEW.blob_sha256)
            OR EXISTS (SELECT FROM urza.natives n WHERE n.blob_sha256 = NEW.blob_sha256))
    THEN
        RAISE EXCEPTION 'blob % is alive', NEW.blob_sha256 USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
