"""Where control signals come from (equations 1 to 3)."""
