"""The training program: arguments, recipes, the Trainer, checkpoints, and what is done with a finished run."""
