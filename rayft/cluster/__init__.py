"""A Ray cluster as a whole: joining it, what it has, work over it, and signals that end us."""
