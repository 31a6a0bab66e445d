"""Rows that cannot be read: row c54 and promise 14."""
