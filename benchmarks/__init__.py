"""Programs that measure what the methods cost; run as `python -m benchmarks.cost`."""
