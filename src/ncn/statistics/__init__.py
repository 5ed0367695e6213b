"""From repeated measurements to an interval and a p-value. Free of torch."""
