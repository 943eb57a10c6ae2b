"""Images and labels in: files, intensity maps, sources, prepared data sets."""
