"""Carving: what of a network no longer pays is proposed, silenced on trial, observed, and taken out or woken.

``papers`` and ``rules`` need no torch; ``carver`` drives a run's network as ``esper_core.control.grower`` does, once per epoch.
"""
