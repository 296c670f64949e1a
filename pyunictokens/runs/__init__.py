"""One run from start to finish and its folder, runs over many concepts, and what they need to load."""
