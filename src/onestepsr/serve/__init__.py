"""Web page and HTTP API over one upscaler."""
