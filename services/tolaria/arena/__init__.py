"""Ways of growing against one another: the same tasks, seeds and data, every arm in the same lifecycle."""
