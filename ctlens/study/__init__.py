"""A study: threats, conditions, seeds and organisms in one folder, from training to the report."""
