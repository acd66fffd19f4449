"""The skeleton of every package's command line."""
