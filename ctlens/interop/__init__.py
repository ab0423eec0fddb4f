"""Other people's tools: models and threats of ctlens in Inspect, and what comes back."""
