"""What is to be known of a node before it trains, a subject a file."""
