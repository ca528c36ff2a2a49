"""The mask structures that ship with Paring, one kind a file."""
