"""From weights to videos: level by level, tile by tile, with cached context."""
