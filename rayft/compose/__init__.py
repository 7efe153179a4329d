"""One run from its parts; the loop never learns a name of a technique."""
