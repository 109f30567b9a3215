"""Metrics of a run: a local file, and an MLflow run."""
