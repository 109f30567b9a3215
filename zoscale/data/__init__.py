"""Examples of a run, and the micro-batches that they become."""
