"""Caches of other repositories, one module per format: what `export` writes, `import` reads."""
