"""Emrakul, the architectural sculptor: proposes what a network no longer needs; runs alone take it out."""
