"""The one stream of events."""
