"""Planning a training before anything is loaded: memory by part, largest batches, time of a step."""
