"""A controller on a base put to text of another kind, beside the usual adapters."""
