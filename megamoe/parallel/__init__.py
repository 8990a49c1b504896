"""How the ranks share one model: layout, memory, agreement between ranks; ``deepspeed`` holds the engines."""
