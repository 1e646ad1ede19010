"""The command line: flags, presets and refusals, a file a subject."""
