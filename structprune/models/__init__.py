"""What a model is made of, and how one is opened: whole in memory, or streamed from its files."""
