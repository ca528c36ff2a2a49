"""Training a block to give what it gave before it was compressed."""
