"""A page to try adapters: one frozen backbone, several tasks, and training on images of one's own."""
