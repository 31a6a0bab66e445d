"""The HTTP door against what has gone wrong elsewhere; what is not in test_http_guard."""
