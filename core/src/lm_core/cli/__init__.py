"""Parsers, reports and shared flags of the packages' command lines."""
