"""What a run will cost, on paper: shapes of models, sizes of groups on disk, costs by stage, and the simulation of parts in work."""
