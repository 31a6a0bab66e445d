"""The outbox: rows c39 to c45."""
