"""How alike sets of images are: feature networks, statistics, distances, pixel metrics, comparisons."""
