-- The library: blueprints and kernels that never change once stored, and what is known of a kernel's fitness.
-- Content addresses are primary keys, so storing a thing twice is storing it once. Blobs lie in the S3 store under the
-- digest that stands here; a row is only written after its blob is.
CREATE SCHEMA IF NOT EXISTS urza;

CREATE TABLE urza.blueprints (
    blueprint_id text PRIMARY KEY CHECK (blueprint_id ~ '^blueprint-[0-9a-f]{64}$'),
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name text NOT NULL,
    ir jsonb NOT NULL,
    created timestamptz NOT NULL DEFAULT now(),
    created_by text NOT NULL
);
CREATE INDEX blueprints_name ON urza.blueprints (name);

-- Who descends from whom. A parent need not be in this library: lineage may come from elsewhere.
CREATE TABLE urza.lineage (
    child_id text NOT NULL REFERENCES urza.blueprints (blueprint_id),
    parent_id text NOT NULL,
    PRIMARY KEY (child_id, parent_id)
);
CREATE INDEX lineage_parent ON urza.lineage (parent_id);

-- status: 1 COMPILED, 2 VALIDATED, 3 REJECTED, 4 RETIRED, as in esper.core.v1.KernelStatus.
CREATE TABLE urza.kernels (
    kernel_id text PRIMARY KEY CHECK (kernel_id ~ '^kernel-[0-9a-f]{64}$'),
    blueprint_id text NOT NULL REFERENCES urza.blueprints (blueprint_id),
    interface_id text NOT NULL,
    manifest jsonb NOT NULL,
    blob_sha256 text NOT NULL CHECK (blob_sha256 ~ '^[0-9a-f]{64}$'),
    blob_bytes bigint NOT NULL CHECK (blob_bytes >= 0),
    parameters bigint NOT NULL CHECK (parameters >= 0),
    status smallint NOT NULL DEFAULT 1 CHECK (status BETWEEN 1 AND 4),
    reason text NOT NULL DEFAULT '',
    tags text[] NOT NULL DEFAULT '{}',
    measurement jsonb,
    forward_seconds double precision,
    created timestamptz NOT NULL DEFAULT now(),
    created_by text NOT NULL,
    CHECK (status <> 2 OR measurement IS NOT NULL)
);
CREATE INDEX kernels_choice ON urza.kernels (interface_id, status, parameters, kernel_id);
CREATE INDEX kernels_cost ON urza.kernels (parameters, kernel_id);
CREATE INDEX kernels_tags ON urza.kernels USING gin (tags);
CREATE INDEX kernels_blueprint ON urza.kernels (blueprint_id);

-- One signed statement per role: the build's for ever, the validation's as of the last measurement.
CREATE TABLE urza.attestations (
    kernel_id text NOT NULL REFERENCES urza.kernels (kernel_id),
    role text NOT NULL CHECK (role IN ('build', 'validation')),
    payload_type text NOT NULL,
    payload bytea NOT NULL,
    key_id text NOT NULL,
    signature bytea NOT NULL,
    created timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kernel_id, role)
);

-- What is stored stays as it is, and the status moves only along its edges, whoever writes the SQL.
CREATE FUNCTION urza.keep_kernel() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.kernel_id, NEW.blueprint_id, NEW.interface_id, NEW.manifest, NEW.blob_sha256, NEW.blob_bytes)
        IS DISTINCT FROM (OLD.kernel_id, OLD.blueprint_id, OLD.interface_id, OLD.manifest, OLD.blob_sha256, OLD.blob_bytes)
    THEN
        RAISE EXCEPTION 'kernel % is immutable', OLD.kernel_id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN ((1, 2), (1, 3), (2, 4)) THEN
        RAISE EXCEPTION 'kernel % cannot go from status % to %', OLD.kernel_id, OLD.status, NEW.status
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER keep_kernel BEFORE UPDATE ON urza.kernels FOR EACH ROW EXECUTE FUNCTION urza.keep_kernel();

CREATE FUNCTION urza.keep_blueprint() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'blueprint % is immutable', OLD.blueprint_id USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER keep_blueprint BEFORE UPDATE ON urza.blueprints FOR EACH ROW EXECUTE FUNCTION urza.keep_blueprint();
