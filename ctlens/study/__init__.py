"""A study: threats, conditions and seeds in one folder, from training to the report."""
