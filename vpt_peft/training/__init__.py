"""Fine-tuning around the prompts: data, transforms, metrics, arguments, recipes and the training program."""
