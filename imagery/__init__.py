"""Images: pixels, rasters read by windows, tiles, results, pictures."""
