"""The ``evaluate`` commands."""
