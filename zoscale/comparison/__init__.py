"""`zoscale compare`: which method is better per forward pass, per second and per device hour, by what was logged."""
