"""Making models smaller: what to remove, by which score, and what is lost. Pure functions and results."""
