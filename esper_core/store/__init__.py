"""The system of record: rows in PostgreSQL (``postgres``) and content-addressed bytes on S3 (``blobs``)."""
