"""Kasmina's body: slots on any network, blending, growth signals, isolated training, folding. Knows no network."""
