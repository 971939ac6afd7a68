"""The central library: keeps blueprints and kernels for ever and tells which of them are fit. Imports no torch."""
