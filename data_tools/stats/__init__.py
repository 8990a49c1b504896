"""What is in shards, counted in one pass, and the page that shows it."""
