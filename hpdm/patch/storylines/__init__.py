"""Level 0 of a long video, which the levels above follow: how it goes on from window to window, by scheme."""
