-- What is built and not judged in time is waited for no longer: design state 6 UNJUDGED, search state 4 GAVE_UP.
ALTER TABLE karn.designs
    DROP CONSTRAINT designs_state_check,
    ADD CONSTRAINT designs_state_check CHECK (state BETWEEN 1 AND 6),
    -- When its kernel was first seen without a verdict, and when a verdict came in.
    ADD COLUMN built timestamptz,
    ADD COLUMN judged timestamptz;
CREATE INDEX designs_judged ON karn.designs (judged);
ALTER TABLE karn.searches
    DROP CONSTRAINT searches_state_check,
    ADD CONSTRAINT searches_state_check CHECK (state BETWEEN 1 AND 4),
    ADD COLUMN reason text NOT NULL DEFAULT '';
