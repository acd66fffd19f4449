"""The sorting task of the quickstart."""
