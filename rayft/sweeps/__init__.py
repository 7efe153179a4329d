"""One sweep from start to end, on the driver."""
