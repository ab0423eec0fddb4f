"""What everything stands on: errors, types, files, configs, statistics."""
