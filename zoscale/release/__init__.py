"""What a finished run gives away: its adapter or whole model, with a model card."""
