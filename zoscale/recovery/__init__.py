"""The journal of steps, checkpoints, and what continues or replays a run from them."""
