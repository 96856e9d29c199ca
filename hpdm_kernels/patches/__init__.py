"""Extraction of patches from a video: crop and antialiased resize (paper eq. 6)."""
