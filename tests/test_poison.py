"""Turns that kill the process, and stops that are nobody's failure: rows c26 to c31."""
