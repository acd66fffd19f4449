"""The quickstart of the command, on a sorting task."""
