"""Images and captions as one manifest, a module for each published data set, labels, and downloads."""
