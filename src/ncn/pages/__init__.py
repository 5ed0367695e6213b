"""How reports and figures look: pages, style, curves, numbers. Free of torch."""
