"""Kasmina, the remote face: orders go out to runs, and their seeds' states come back."""
