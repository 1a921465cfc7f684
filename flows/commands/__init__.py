"""The commands of `fisherfold`, by what they do: run, look, use a model, look after shared storage. What they need is imported when they run."""
