"""Settings of a run: schema, YAML and overrides, contradictions."""
