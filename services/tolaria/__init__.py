"""Tolaria: the training process, and the platform's book of runs."""
