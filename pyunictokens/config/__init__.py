"""Settings as frozen dataclasses that check themselves, one reader for YAML and ``key=value`` words."""
