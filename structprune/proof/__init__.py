"""What is true of a folder, measured from its files by a second code path."""
