"""Caches of other repositories, one module a format: what `export` writes, `import` reads."""
