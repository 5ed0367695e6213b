"""Inputs from outside: values of sliders, what documents give, attributes, decoupling."""
