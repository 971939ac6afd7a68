-- What was wrong, by name, as in esper.core.v1.RejectionReason.
ALTER TABLE urabrask.evaluations
    ADD COLUMN rejection smallint CHECK (rejection > 0);
