"""Tiles of a video: extraction, and averaging where they overlap (paper section 4.4)."""
