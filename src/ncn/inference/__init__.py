"""Using a model: writing, evaluating, and holding its signals still."""
