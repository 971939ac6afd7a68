"""Making a network smaller: which units stand together, what each is worth, silencing them on trial, taking them out for good.

Knows no network and decides nothing: when to carve, and whether it paid, is ``esper_core.control.carve``'s business.
"""
