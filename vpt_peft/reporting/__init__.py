"""What is told of runs in words: tables and model cards."""
