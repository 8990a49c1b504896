"""What each verb of `megamoe data` does, one per file."""
