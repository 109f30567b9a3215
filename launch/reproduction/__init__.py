"""The seed paper's tables with our runs beside them: see `launch/reproduce.py`."""
