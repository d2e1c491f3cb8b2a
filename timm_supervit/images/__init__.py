"""Images to evaluate on, and what a pass over them checks and counts."""
