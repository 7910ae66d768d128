"""The RAM image tagger."""
