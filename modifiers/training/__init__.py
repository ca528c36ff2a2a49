"""What a stage trains, and how fast."""
