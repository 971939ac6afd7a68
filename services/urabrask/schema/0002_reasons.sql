-- What was wrong, by name, as in esper.core.v1.RejectionReason; and what tiers of parameters are cut from.
ALTER TABLE urabrask.evaluations
    ADD COLUMN rejection smallint CHECK (rejection > 0),
    ADD COLUMN parameters bigint CHECK (parameters >= 0);
