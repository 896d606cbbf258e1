"""Images and their targets: where they come from, how they are split, and how they become model input."""
