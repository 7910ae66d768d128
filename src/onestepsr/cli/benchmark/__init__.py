"""The ``benchmark`` commands."""
