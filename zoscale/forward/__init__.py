"""The losses of all candidates of a step: one pass each (`sequential`), or one for all (`fan_out`)."""
