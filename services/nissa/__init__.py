"""Nissa: everything that happened, as it happens and afterwards."""
