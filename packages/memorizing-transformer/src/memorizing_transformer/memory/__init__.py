"""The external memory: storage, exact and approximate search."""
