"""The ground floor of the package: errors, types, files, configs, limits and statistics; it imports no other room."""
