"""Does growing pay? Every arm on every development task, ten paired seeds, and a verdict per goal."""
