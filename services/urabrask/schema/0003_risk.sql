-- How grafts ended in the field, and what was learnt from that.
CREATE TABLE urabrask.reports (
    report_id text PRIMARY KEY,
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    kernel_id text NOT NULL,
    run_id text NOT NULL,
    kept boolean NOT NULL,
    reported timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX reports_kernel ON urabrask.reports (kernel_id);

-- Models that told a kernel's risk; the newest holds. Coefficients as JSON, never a pickle.
CREATE TABLE urabrask.risk_models (
    version text PRIMARY KEY,
    serial bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    reports integer NOT NULL CHECK (reports > 0),
    model jsonb NOT NULL,
    fitted timestamptz NOT NULL DEFAULT now()
);

-- What a kernel's risk is computed from beside its measurement, so that a new model need not ask the library; the risk
-- itself and the model that told it.
ALTER TABLE urabrask.evaluations
    ADD COLUMN design jsonb,
    ADD COLUMN risk double precision CHECK (risk BETWEEN 0 AND 1),
    ADD COLUMN risk_model text NOT NULL DEFAULT '';
