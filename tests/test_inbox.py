"""The inbox: rows c32 to c38."""
