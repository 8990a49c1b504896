"""Training on many nodes: the supervisor, its control server, and an agent on each node."""
