"""Building a cache: encode once, normalise, close with a manifest."""
