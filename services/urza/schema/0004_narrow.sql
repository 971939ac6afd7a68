-- A search looks at many rows and shows few. The manifest is what makes a row long, so it lies apart from the columns
-- that are looked at; it does not shrink enough to be worth packing.
ALTER TABLE urza.kernels ALTER COLUMN manifest SET STORAGE EXTERNAL, SET (toast_tuple_target = 1024);
-- Limits on latency and memory together are settled inside the index.
CREATE INDEX kernels_limits ON urza.kernels (status, speed, peak_memory_bytes);
