"""An image file in and out: decoding, writing, colour profiles, metadata, resizing, colour transfer."""
