"""Which sample comes when, and where a run stands in that order."""
