"""Super-training: the objective as tasks of timm, and label maps as its data."""
