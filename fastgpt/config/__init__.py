"""Settings of a run: schema, flags, files, presets."""
