"""From YAML to typed settings, tasks, models and algorithms."""
