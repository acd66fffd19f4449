"""The key-value arithmetic task of the quickstart."""
