"""The training session and its parts: optimizer, schedule, metrics, run directory."""
