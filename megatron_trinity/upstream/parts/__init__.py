"""What an adaptation is made of where its own file would be too long; imported when it is made."""
