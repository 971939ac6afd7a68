-- What kernels are looked for by, as columns of their own: figures of the measurement, who brought the blueprint, and in
-- which order kernels came. A revision counts verdicts, so that of two at the same time only one can be the next.
ALTER TABLE urza.kernels
    ADD COLUMN serial bigint GENERATED ALWAYS AS IDENTITY,
    ADD COLUMN revision integer NOT NULL DEFAULT 0,
    ADD COLUMN born_of text NOT NULL DEFAULT '',
    ADD COLUMN interest double precision NOT NULL DEFAULT '-infinity',
    ADD COLUMN forward_seconds_p99 double precision
        GENERATED ALWAYS AS ((measurement ->> 'forward_seconds_p99')::double precision) STORED,
    ADD COLUMN peak_memory_bytes bigint GENERATED ALWAYS AS ((measurement ->> 'peak_memory_bytes')::bigint) STORED,
    ADD COLUMN target text GENERATED ALWAYS AS (measurement ->> 'target') STORED,
    -- what is sorted by must not be null; what was not measured comes last
    ADD COLUMN speed double precision NOT NULL
        GENERATED ALWAYS AS (coalesce((measurement ->> 'forward_seconds')::double precision, 'infinity')) STORED;
UPDATE urza.kernels k SET born_of = b.created_by FROM urza.blueprints b WHERE b.blueprint_id = k.blueprint_id;

-- One index per order, and the same within an interface and status: what a controller asks for at every boundary.
CREATE INDEX kernels_speed ON urza.kernels (speed, kernel_id);
CREATE INDEX kernels_interest ON urza.kernels (interest, kernel_id);
CREATE UNIQUE INDEX kernels_serial ON urza.kernels (serial);
CREATE INDEX kernels_choice_speed ON urza.kernels (interface_id, status, speed, kernel_id);
CREATE INDEX kernels_choice_interest ON urza.kernels (interface_id, status, interest, kernel_id);
-- What is rare is found by itself and then sorted.
CREATE INDEX kernels_born_of ON urza.kernels (born_of, parameters, kernel_id);
DROP INDEX urza.kernels_blueprint;
CREATE INDEX kernels_blueprint ON urza.kernels (blueprint_id, parameters, kernel_id);
