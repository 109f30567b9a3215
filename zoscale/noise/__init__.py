"""Random numbers as pure functions of their coordinates, and arithmetic on weights that uses them."""
