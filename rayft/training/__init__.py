"""One run under Ray Train, from the command to its last attempt."""
