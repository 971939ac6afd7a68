"""Oona, the bus's own keeper: publishes what other services have recorded, and writes down what nobody could take."""
