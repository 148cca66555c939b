"""Similarity of sets of images: feature networks, statistics, distances, pixel metrics, comparisons."""
