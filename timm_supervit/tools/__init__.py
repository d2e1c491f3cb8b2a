"""What one does with a super vision transformer, as plain functions; the command line in ``cli`` calls them."""
