"""The report: a self-contained page of finished evaluations."""
