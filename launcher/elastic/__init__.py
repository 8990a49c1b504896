"""Train on many nodes: a supervisor that decides, its control server, and an agent on each node."""
