"""`zoscale compare`: which method is better per forward equivalent, second and device hour, by what was logged."""
