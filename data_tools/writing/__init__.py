"""Reading whole samples and writing shards of them, with an account of every sample."""
