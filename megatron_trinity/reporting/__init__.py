"""What a run tells: its events in a file, its lines on a console, its page."""
