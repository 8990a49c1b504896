"""How the ranks share one model: layout, process groups, DeepSpeed engines, expert exchange."""
