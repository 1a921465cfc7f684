"""A run on Ray: joining a cluster, checking its nodes, giving units to workers, and the channel from a stage's process to its run."""
