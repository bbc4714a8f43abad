"""What is asked of a run: settings, flags, files, presets."""
