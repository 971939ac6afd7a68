-- What became of kernels in the field. A kernel's interest is the base-2 logarithm of its deeds' sum, each weighing
-- 2^(number of the deed / 1000): that order does not change as time goes by, and what an interest is worth today is
-- 2^(interest - number of the newest deed / 1000). Minus infinity: never used.
CREATE SEQUENCE urza.deeds MINVALUE 0 START 0;
SELECT nextval('urza.deeds');
CREATE TABLE urza.usage (
    kernel_id text PRIMARY KEY REFERENCES urza.kernels (kernel_id) ON DELETE CASCADE,
    streams bigint NOT NULL DEFAULT 0,
    fossilized bigint NOT NULL DEFAULT 0,
    culled bigint NOT NULL DEFAULT 0,
    rolled_back bigint NOT NULL DEFAULT 0,
    measured bigint NOT NULL DEFAULT 0,
    contribution double precision NOT NULL DEFAULT 0
);

-- Kernels that were forgotten. One that was judged unfit or withdrawn stays away; one that was merely not used may come
-- back, with the same bytes.
CREATE TABLE urza.tombstones (
    kernel_id text PRIMARY KEY,
    blueprint_id text NOT NULL,
    interface_id text NOT NULL,
    blob_sha256 text NOT NULL,
    serial bigint NOT NULL,
    status smallint NOT NULL,
    reason text NOT NULL,
    forgotten timestamptz NOT NULL DEFAULT now()
);
CREATE FUNCTION urza.heed_tombstone() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM urza.tombstones t WHERE t.kernel_id = NEW.kernel_id
        AND (t.status IN (3, 4) OR t.blob_sha256 <> NEW.blob_sha256))
    THEN
        RAISE EXCEPTION 'kernel % was forgotten for good', NEW.kernel_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER heed_tombstone BEFORE INSERT ON urza.kernels FOR EACH ROW EXECUTE FUNCTION urza.heed_tombstone();

-- Copies of blobs in the S3 store. Deleting there cannot be made conditional nor called back, so a copy's name is never
-- used again: whoever wants the bytes after their copy was doomed makes the next one. state: 1 live, 2 doomed, 3 deleted,
-- 4 deleted once more, for a write may have been on its way.
CREATE TABLE urza.copies (
    blob_sha256 text NOT NULL,
    number integer NOT NULL CHECK (number >= 0),
    blob_bytes bigint NOT NULL,
    state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 4),
    PRIMARY KEY (blob_sha256, number)
);
CREATE UNIQUE INDEX copies_live ON urza.copies (blob_sha256) WHERE state = 1;
CREATE INDEX copies_dying ON urza.copies (state, blob_sha256) WHERE state IN (2, 3);
CREATE INDEX kernels_blob ON urza.kernels (blob_sha256);
INSERT INTO urza.copies (blob_sha256, number, blob_bytes)
    SELECT DISTINCT ON (blob_sha256) blob_sha256, 0, blob_bytes FROM urza.kernels;

CREATE FUNCTION urza.keep_copy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state < OLD.state OR (NEW.blob_sha256, NEW.number) IS DISTINCT FROM (OLD.blob_sha256, OLD.number) THEN
        RAISE EXCEPTION 'a copy of % cannot come back', OLD.blob_sha256 USING ERRCODE = 'restrict_violation';
    END IF;
    IF OLD.state = 1 AND NEW.state > 1
        AND EXISTS (SELECT FROM urza.kernels k WHERE k.blob_sha256 = NEW.blob_sha256)
    THEN
        RAISE EXCEPTION 'blob % is alive', NEW.blob_sha256 USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER keep_copy BEFORE UPDATE ON urza.copies FOR EACH ROW EXECUTE FUNCTION urza.keep_copy();
