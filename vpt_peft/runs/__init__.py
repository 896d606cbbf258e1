"""Several training runs below one folder: comparisons and sweeps, which continue where they were interrupted."""
