"""Instruments: each measures one thing and returns it as data; `cli/` prints it."""
