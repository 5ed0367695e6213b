"""The equations: the model, its layers, its controller and the signals between them."""
